//! Our parameters on the kernel's command line. Pure: text in, values out.
//!
//! The kernel passes words with a dot before their `=` to no program (they could be a module's), so
//! `hotslot.*` is read from `/proc/cmdline`, and the command behind `--` with it: one place, and one set of
//! quoting rules (the kernel's: double quotes join words and vanish).

/// What [`crate::boot`] is asked to do. Each field's parameter is described in `guest/README.md`.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Parameters {
    /// `hotslot.modules=a,b`: load only these of the image's modules; `None`: all of them.
    pub modules: Option<Vec<String>>,
    /// `hotslot.debug_exit=0xf4`: the I/O port to which the command's exit status is written.
    pub debug_exit: Option<u16>,
    /// `hotslot.hold_vm`: keep one idle KVM machine open.
    pub hold_vm: bool,
    /// `hotslot.link=NAME`: take the command from the virtio-serial port of that name ([`crate::lab`]).
    pub link: Option<String>,
    /// The words behind `--`.
    pub command: Vec<String>,
    /// One sentence for each parameter that was not understood.
    pub complaints: Vec<String>,
}

/// Reads a kernel command line.
pub fn parse(line: &str) -> Parameters {
    let mut parameters = Parameters::default();
    let mut words = split(line).into_iter();
    for word in words.by_ref() {
        if word == "--" {
            break;
        }
        let (name, value) = match word.split_once('=') {
            Some((name, value)) => (name, value),
            None => (word.as_str(), ""),
        };
        match name {
            "hotslot.modules" => {
                let names = value.split(',').filter(|name| !name.is_empty());
                parameters.modules = Some(names.map(str::to_owned).collect());
            }
            "hotslot.debug_exit" => match number(value).and_then(|port| u16::try_from(port).ok()) {
                Some(port) => parameters.debug_exit = Some(port),
                None => parameters
                    .complaints
                    .push(format!("hotslot.debug_exit={value}: this is no I/O port (0 to 0xffff)")),
            },
            "hotslot.hold_vm" => parameters.hold_vm = true,
            "hotslot.link" => parameters.link = Some(value.to_owned()),
            _ if name.starts_with("hotslot.") => {
                parameters.complaints.push(format!("{word}: there is no such parameter"))
            }
            _ => {}
        }
    }
    parameters.command = words.collect();
    parameters
}

/// A number, decimal or with `0x`.
pub fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

/// Words between white space; double quotes join words and vanish.
fn split(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quoted = false;
    for letter in line.chars() {
        if letter == '"' {
            quoted = !quoted;
            word.get_or_insert_default();
        } else if letter.is_whitespace() && !quoted {
            words.extend(word.take());
        } else {
            word.get_or_insert_default().push(letter);
        }
    }
    words.extend(word);
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_without_us_asks_for_nothing() {
        assert_eq!(parse("console=ttyS0 reboot=t ro\n"), Parameters::default());
        assert_eq!(parse(""), Parameters::default());
    }

    #[test]
    fn each_parameter_is_read() {
        let read = parse(
            "quiet hotslot.modules=virtio_mmio,nd_pmem hotslot.debug_exit=0xf4 hotslot.hold_vm hotslot.link=lab",
        );
        assert_eq!(read.modules, Some(vec!["virtio_mmio".to_owned(), "nd_pmem".to_owned()]));
        assert_eq!(read.debug_exit, Some(0xf4));
        assert!(read.hold_vm);
        assert_eq!(read.link.as_deref(), Some("lab"));
        assert!(read.command.is_empty() && read.complaints.is_empty());
    }

    #[test]
    fn no_modules_is_not_the_same_as_all_modules() {
        assert_eq!(parse("hotslot.modules=").modules, Some(vec![]));
        assert_eq!(parse("quiet").modules, None);
    }

    #[test]
    fn the_command_is_what_follows_the_dashes() {
        let read = parse("quiet -- sh -c \"echo a  b; exit 3\" -- hotslot.hold_vm");
        assert_eq!(read.command, ["sh", "-c", "echo a  b; exit 3", "--", "hotslot.hold_vm"]);
        assert!(!read.hold_vm);
    }

    #[test]
    fn quotes_make_an_empty_word_and_may_start_inside_one() {
        assert_eq!(split("a \"\" b=\"c d\"e"), ["a", "", "b=c de"]);
    }

    #[test]
    fn what_is_not_understood_is_said_and_skipped() {
        let read = parse("hotslot.debug_exit=0x10000 hotslot.nonsense=1 hotslot.hold_vm");
        assert_eq!(read.debug_exit, None);
        assert_eq!(read.complaints.len(), 2);
        assert!(read.hold_vm);
    }

    #[test]
    fn numbers_are_decimal_or_hexadecimal() {
        assert_eq!(number("244"), Some(244));
        assert_eq!(number("0xf4"), Some(244));
        assert_eq!(number("f4"), None);
        assert_eq!(number(""), None);
        assert_eq!(number("-1"), None);
    }
}
