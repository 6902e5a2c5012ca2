//! Sizes on a command line: `4096`, `64K`, `16M`, `8G`; and in pictures: `64 KiB`, `2.75 GiB`.
//!
//! The units are binary (1K = 1024 bytes), because memory and files that are mapped into it come in pages.
//! Called by the argument parsers of `hotslot` and `hotslot-backend`, and by `picture`.

/// Why a text is not a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum SizeError {
    #[error(
        "{0:?} is not a size: expected a whole number of bytes with an optional unit K, M, G or T, as in 16M"
    )]
    NotANumber(String),
    #[error("{0:?} is more than 2^64 - 1 bytes")]
    TooLarge(String),
}

/// The number of bytes that `text` names: decimal digits, then at most one of the units K, M, G, T (either
/// case). Zero is a size; the caller decides whether it makes sense.
///
/// # Errors
///
/// Signs, fractions, spaces, other units (`KiB`, `MB`) and anything that does not fit in a `u64`.
pub fn parse(text: &str) -> Result<u64, SizeError> {
    let (digits, shift) = match text.char_indices().next_back() {
        Some((at, 'K' | 'k')) => (&text[..at], 10),
        Some((at, 'M' | 'm')) => (&text[..at], 20),
        Some((at, 'G' | 'g')) => (&text[..at], 30),
        Some((at, 'T' | 't')) => (&text[..at], 40),
        _ => (text, 0),
    };
    // `str::parse` alone would take a leading plus sign.
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(SizeError::NotANumber(text.to_owned()));
    }
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| SizeError::TooLarge(text.to_owned()))
}

/// A number of bytes for a reader: exact, in the largest unit in which it has at most two decimals.
pub fn text(bytes: u64) -> String {
    let units = ["TiB", "GiB", "MiB", "KiB"].into_iter().zip([40, 30, 20, 10]);
    for (unit, shift) in units {
        let hundredths = u128::from(bytes) * 100;
        if bytes >> shift > 0 && hundredths.is_multiple_of(1 << shift) {
            let (whole, rest) = (bytes >> shift, (hundredths >> shift) % 100);
            let decimals = if rest == 0 { String::new() } else { format!(".{rest:02}") };
            return format!("{whole}{} {unit}", decimals.trim_end_matches('0'));
        }
    }
    if bytes == 1 { "1 byte".to_owned() } else { format!("{bytes} bytes") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_exact() {
        for (bytes, expected) in [
            (0, "0 bytes"),
            (1, "1 byte"),
            (4095, "4095 bytes"),
            (4096, "4 KiB"),
            (639 << 10, "639 KiB"),
            (3 << 29, "1.5 GiB"),
            (11 << 28, "2.75 GiB"),
            ((1 << 30) + 4096, "1048580 KiB"),
            (1 << 63, "8388608 TiB"),
            (u64::MAX, "18446744073709551615 bytes"),
        ] {
            assert_eq!(text(bytes), expected);
        }
    }

    #[test]
    fn numbers_with_and_without_a_unit() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("64K", 64 << 10),
            ("16M", 16 << 20),
            ("16m", 16 << 20),
            ("8G", 8 << 30),
            ("2T", 2 << 40),
            ("007", 7),
            ("18446744073709551615", u64::MAX),
            ("16777215T", 16_777_215 << 40),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_number() {
        for text in
            ["", "K", "-1", "+1", "1.5G", "1 M", " 1M", "4KiB", "4KB", "0x1000", "1MM", "12Q", "１", "1µ"]
        {
            assert_eq!(parse(text), Err(SizeError::NotANumber(text.to_owned())), "{text}");
        }
    }

    #[test]
    fn what_does_not_fit() {
        for text in ["18446744073709551616", "16777216T", "99999999999999999999999K"] {
            assert_eq!(parse(text), Err(SizeError::TooLarge(text.to_owned())), "{text}");
        }
    }
}
