//! Processor time of the whole machine. Sender, path and receiver share its processors, and much of
//! the path's work is charged to no process.

use std::time::Duration;

use anyhow::{Context as _, Result};

/// What `/proc/stat` counts in: USER_HZ is 100 on every architecture we run on.
const TICK: Duration = Duration::from_millis(10);

/// The time all processors together have worked since boot, without what user processes of a lower
/// priority took: a measurement runs at the normal one, so that is others' work.
pub(super) fn busy() -> Result<Duration> {
    let text = std::fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
    parse(&text).context("/proc/stat is not what it should be")
}

fn parse(stat: &str) -> Option<Duration> {
    let mut fields = stat.lines().next()?.split_whitespace();
    if fields.next()? != "cpu" {
        return None;
    }
    // user, nice, system, idle, iowait, irq, softirq, then what other machines took of ours.
    let fields: Vec<u32> = fields.map(|it| it.parse().ok()).collect::<Option<_>>()?;
    let [user, _nice, system, _idle, _iowait, irq, softirq, ..] = fields.as_slice() else {
        return None;
    };
    Some(TICK * (user + system + irq + softirq))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neither_waiting_nor_niced_work_counts() {
        let stat = "cpu  10 1 20 9999 500 3 16 77 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\nintr 5\n";
        assert_eq!(parse(stat), Some(Duration::from_millis(490)));
        assert_eq!(parse("cpu0 1 1 1 1 1 1 1 1 0 0\n"), None);
        assert_eq!(parse("cpu 1 2 3\n"), None);
    }
}
