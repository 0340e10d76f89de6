//! The machine that something was measured on.

/// Where and when: figures without it say nothing.
pub(crate) fn describe() -> String {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("processor unknown", |(_, model)| model);
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let kernel = read("/proc/sys/kernel/osrelease");
    let machine = format!("{processors} × {model}, Linux {}", kernel.trim());
    match others_at_work() {
        Some(load) => format!("{machine}\nload {load} before: others were at work, measure again"),
        None => machine,
    }
}

/// The load average over the last minutes, where it is so high that others kept the processors
/// busy: a measurement itself adds no more than two to it, and not yet to this one.
fn others_at_work() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/loadavg").ok()?;
    let load: f64 = text.split(' ').nth(2)?.parse().ok()?;
    (load > 2.0).then_some(load)
}
