//! Tables and numbers as Docker prints them. Pure.

/// A table, laid out as Docker's tabwriter does: columns at least 10 wide with 3 spaces between,
/// nothing after the last.
pub(super) struct Table {
    rows: Vec<Vec<String>>,
}

const MIN_WIDTH: usize = 10;
const PADDING: usize = 3;

impl Table {
    pub(super) fn new<const N: usize>(header: [&str; N]) -> Self {
        Self { rows: vec![header.map(ToOwned::to_owned).to_vec()] }
    }

    pub(super) fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.to_vec());
    }

    /// The text, each row ended by a newline.
    pub(super) fn render(&self) -> String {
        let columns = self.rows.first().map_or(0, Vec::len);
        let widths: Vec<_> = (0..columns)
            .map(|column| {
                let cells = self.rows.iter().filter_map(|row| row.get(column));
                let longest = cells.map(|cell| cell.chars().count()).max().unwrap_or(0);
                (longest + PADDING).max(MIN_WIDTH)
            })
            .collect();
        let mut text = String::new();
        for row in &self.rows {
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                text.push_str(cell);
                if column + 1 < columns {
                    let blanks = width.saturating_sub(cell.chars().count());
                    text.extend(std::iter::repeat_n(' ', blanks));
                }
            }
            text.push('\n');
        }
        text
    }
}

/// Bytes in decimal units with three digits, as `docker stats` has them: `1.45kB`.
pub(super) fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "kB", "MB", "GB", "TB", "PB", "EB"];
    // Whole thousandths of the unit, so nothing here depends on floating point.
    let mut unit = 0;
    let mut divisor: u64 = 1;
    while bytes / divisor >= 1000 && unit + 1 < UNITS.len() {
        divisor *= 1000;
        unit += 1;
    }
    let decimals = match bytes / divisor {
        _ if unit == 0 => 0,
        0..10 => 2,
        10..100 => 1,
        _ => 0,
    };
    let scale = 10u128.pow(decimals);
    let half = u128::from(divisor) / 2;
    let rounded = (u128::from(bytes) * scale + half) / u128::from(divisor);
    if rounded >= 1000 * scale && unit + 1 < UNITS.len() {
        // 999 999 is 1MB and not 1000kB.
        return format!("1{}", UNITS.get(unit + 1).unwrap_or(&""));
    }
    let (whole, fraction) = (rounded / scale, rounded % scale);
    let width = usize::try_from(decimals).unwrap_or(0);
    let fraction = format!("{fraction:0width$}");
    let fraction = if decimals == 0 { "" } else { fraction.trim_end_matches('0') };
    let point = if fraction.is_empty() { "" } else { "." };
    format!("{whole}{point}{fraction}{}", UNITS.get(unit).unwrap_or(&""))
}

/// The first 12 characters of an id, as Docker shortens them.
pub(super) fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_as_docker_prints_them() {
        for (bytes, text) in [
            (0, "0B"),
            (999, "999B"),
            (1000, "1kB"),
            (1450, "1.45kB"),
            (1455, "1.46kB"),
            (14_500, "14.5kB"),
            (145_600, "146kB"),
            (999_999, "1MB"),
            (9_999, "10kB"),
            (99_990, "100kB"),
            (1_234_567_890, "1.23GB"),
            (u64::MAX, "18.4EB"),
        ] {
            assert_eq!(human_bytes(bytes), text, "{bytes}");
        }
    }

    #[test]
    fn columns_are_as_wide_as_dockers() {
        let mut table = Table::new(["NETWORK ID", "NAME", "DRIVER", "SCOPE"]);
        for [id, name, driver, scope] in [
            ["72e4d7b5a4d6", "bridge", "bridge", "local"],
            ["b0c1c9d2a7f7", "host", "host", "local"],
        ] {
            table.row([id.into(), name.into(), driver.into(), scope.into()]);
        }
        // What `docker network ls` of 29 prints.
        assert_eq!(
            table.render(),
            "NETWORK ID     NAME      DRIVER    SCOPE\n\
             72e4d7b5a4d6   bridge    bridge    local\n\
             b0c1c9d2a7f7   host      host      local\n"
        );
    }

    #[test]
    fn short_ids_are_left_alone() {
        assert_eq!(short("0123456789abcdef"), "0123456789ab");
        assert_eq!(short("abc"), "abc");
    }
}
