//! What the test runs say, line by line, summed up.

use std::collections::BTreeSet;
use std::fmt;

/// Counts over all test binaries.
#[derive(Default)]
pub(crate) struct Report {
    passed: usize,
    failures: BTreeSet<String>,
    /// Failed tests by libtest's count; some output of a crash may name no test.
    failed: usize,
    ignored: usize,
    /// `name: why` of each skipped test, once.
    skips: BTreeSet<String>,
    /// Skipped tests that libtest counted as passed.
    skipped_passes: usize,
    part: Part,
    /// The test whose captured output is being read, and whether it has said SKIP.
    current: Option<(String, bool)>,
    /// The last line of a test binary that has begun and not yet given its result.
    unfinished: Option<String>,
}

/// Which part of a test binary's output a line belongs to.
#[derive(Default, PartialEq, Eq)]
enum Part {
    /// The list of tests as they end.
    #[default]
    Running,
    /// Captured output of tests that passed, and their names once more.
    Successes,
    /// Captured output of tests that failed, and their names once more.
    Failures,
}

impl Report {
    /// Takes one line; tells whether it is worth showing.
    pub(crate) fn line(&mut self, layer: &str, line: &str) -> bool {
        if line.starts_with("running ") && (line.ends_with(" tests") || line.ends_with(" test")) {
            self.end_of_binary(layer);
            self.unfinished = Some(line.to_owned());
        } else if let Some(last) = self.unfinished.as_mut().filter(|_| line.starts_with("test ")) {
            line.clone_into(last);
        }
        match line {
            "successes:" => self.part = Part::Successes,
            "failures:" => self.part = Part::Failures,
            _ => {}
        }
        if let Some(result) = line.strip_prefix("test result: ") {
            self.unfinished = None;
            self.end_of_binary(layer);
            let counts = counts(result);
            self.passed += counts.passed;
            self.failed += counts.failed;
            self.ignored += counts.ignored;
            return counts != Counts::default();
        }
        if let Some(name) = line.strip_prefix("---- ").and_then(|l| l.strip_suffix(" stdout ----"))
        {
            self.current = Some((name.to_owned(), false));
        }
        if let Some(skip) = line.trim_start().strip_prefix("SKIP ") {
            self.skip(layer, skip);
        }
        if self.part == Part::Running
            && let Some(name) =
                line.strip_prefix("test ").and_then(|l| l.strip_suffix(" ... FAILED"))
        {
            self.failures.insert(format!("{layer}: {name}"));
        }
        self.part != Part::Successes && !line.is_empty() && line != "running 0 tests"
    }

    /// Whether what comes now is shown.
    pub(crate) fn shows(&self) -> bool {
        self.part == Part::Running
    }

    /// A test binary ended; one without a result was taken down by a test.
    pub(crate) fn end_of_binary(&mut self, layer: &str) {
        self.part = Part::Running;
        self.current = None;
        if let Some(last) = self.unfinished.take() {
            self.broken(layer, &format!("ended before its result, after: {}", last.trim()));
        }
    }

    /// A run that failed without saying which test did.
    pub(crate) fn broken(&mut self, layer: &str, why: &str) {
        self.failed += 1;
        self.failures.insert(format!("{layer}: {why}"));
    }

    /// Tests that could not even be begun, of unknown number: one skip.
    pub(crate) fn skipped_all(&mut self, what: &str) {
        println!("SKIP {what}");
        if self.skips.insert(what.to_owned()) {
            self.ignored += 1;
        }
    }

    /// How many tests failed.
    pub(crate) fn failed(&self) -> usize {
        self.failed
    }

    /// How many tests were skipped or are ignored.
    pub(crate) fn skipped(&self) -> usize {
        self.skipped_passes + self.ignored
    }

    fn skip(&mut self, layer: &str, skip: &str) {
        let new = self.skips.insert(format!("{layer}: {skip}"));
        let counts = match &mut self.current {
            // It failed, and is counted as that.
            _ if self.part == Part::Failures => false,
            // A test may say it for each thing it lacks, and is skipped once.
            Some((_, said)) => !std::mem::replace(said, true),
            // Written past libtest's capture, and so not in its test's section.
            None => new,
        };
        if counts {
            self.skipped_passes += 1;
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for skip in &self.skips {
            writeln!(f, "SKIP   {skip}")?;
        }
        for failure in &self.failures {
            writeln!(f, "FAILED {failure}")?;
        }
        let passed = self.passed.saturating_sub(self.skipped_passes);
        writeln!(f, "{passed} passed, {} failed, {} skipped", self.failed, self.skipped())
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    passed: usize,
    failed: usize,
    ignored: usize,
}

/// Reads `ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s`.
fn counts(result: &str) -> Counts {
    let of = |what: &str| {
        result
            .split([';', '.'])
            .find_map(|part| part.trim().strip_suffix(what)?.trim().parse().ok())
            .unwrap_or(0)
    };
    Counts { passed: of("passed"), failed: of("failed"), ignored: of("ignored") }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "\
running 4 tests
test needs_root ... ok
test adds ... ok
test breaks ... FAILED
test later ... ignored

successes:

---- needs_root stdout ----
SKIP needs_root: not root
SKIP needs_root: not root

---- adds stdout ----
noise

successes:
    adds
    needs_root

failures:

---- breaks stdout ----
thread 'breaks' panicked

failures:
    breaks

test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s
";

    #[test]
    fn a_skipped_test_is_not_a_passed_one() {
        let mut report = Report::default();
        for line in OUTPUT.lines() {
            report.line("bpf", line);
        }
        assert_eq!(
            report.to_string(),
            "SKIP   bpf: needs_root: not root\n\
             FAILED bpf: breaks\n\
             1 passed, 1 failed, 2 skipped\n"
        );
    }

    #[test]
    fn output_of_passed_tests_is_hidden_and_of_failed_ones_shown() {
        let mut report = Report::default();
        let shown: Vec<&str> = OUTPUT.lines().filter(|line| report.line("bpf", line)).collect();
        assert!(!shown.contains(&"noise"));
        assert!(shown.contains(&"thread 'breaks' panicked"));
        assert!(shown.contains(&"test adds ... ok"));
    }

    #[test]
    fn a_binary_without_a_result_is_a_failure_beside_those_of_others() {
        let mut report = Report::default();
        for line in ["running 2 tests", "test adds ... ok", "test crashes ... "] {
            report.line("net", line);
        }
        for line in OUTPUT.lines() {
            report.line("net", line);
        }
        report.end_of_binary("net");
        assert_eq!(report.failed(), 2);
        assert!(report.to_string().contains("ended before its result, after: test crashes ..."));
    }

    #[test]
    fn a_run_that_does_not_compile_counts_as_failed() {
        let mut report = Report::default();
        report.broken("net", "`cargo test` ended with exit status: 101");
        assert_eq!(report.failed(), 1);
        assert!(report.to_string().ends_with("0 passed, 1 failed, 0 skipped\n"));
    }
}
