//! Figures as people read them.

/// As many digits as a measurement deserves: three or four.
pub(crate) fn number(value: f64) -> String {
    let size = value.abs();
    if size >= 10_000.0 {
        let digits = format!("{:.0}", size);
        let mut text = String::new();
        for (index, digit) in digits.chars().enumerate() {
            if index > 0 && (digits.len() - index).is_multiple_of(3) {
                text.push(',');
            }
            text.push(digit);
        }
        return if value < 0.0 { format!("-{text}") } else { text };
    }
    let decimals = match size {
        100.0.. => 0,
        10.0.. => 1,
        0.1.. => 2,
        _ if size == 0.0 => 0,
        _ => 3,
    };
    format!("{value:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::number;

    #[test]
    fn figures_have_three_or_four_digits() {
        let shown = [1_234_567.0, 98_765.4, 1234.5, 321.4, 35.46, 1.357, 0.0123, 0.0].map(number);
        assert_eq!(shown, ["1,234,567", "98,765", "1234", "321", "35.5", "1.36", "0.012", "0"]);
        assert_eq!(number(-12_345.0), "-12,345");
    }
}
