//! Sizes on a command line: `4096`, `64K`, `16M`, `8G`.
//!
//! The units are binary (1K = 1024 bytes), because memory and files that are mapped into it come in pages.
//! Called by the argument parsers of `hotslot` and `hotslot-backend`.

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

#[cfg(test)]
mod tests {
    use super::*;

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
