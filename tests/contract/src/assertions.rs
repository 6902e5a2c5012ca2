//! The assertions of the contract, read from `src/contract.md`. Pure: text in, values out.

/// One numbered assertion.
#[derive(Debug, PartialEq)]
pub struct Assertion {
    pub number: u32,
    /// Without its number and source letter.
    pub text: String,
    /// Not in the table "Not built yet".
    pub is_built: bool,
}

/// All assertions in the order of the text: the list items that begin with `**SHM-n**`.
pub fn parse(contract: &str) -> Vec<Assertion> {
    let unbuilt = not_built_yet(contract);
    let mut assertions = Vec::new();
    for line in contract.lines() {
        let Some((number, text)) = line
            .strip_prefix("- **SHM-")
            .and_then(|rest| rest.split_once("** ("))
            .and_then(|(number, rest)| Some((number.parse().ok()?, rest.split_once(") ")?.1.to_owned())))
        else {
            continue;
        };
        assertions.push(Assertion { number, text, is_built: !unbuilt.contains(&number) });
    }
    assertions
}

/// The numbers in the first column of the table in the section "Not built yet".
fn not_built_yet(contract: &str) -> Vec<u32> {
    let section = contract.lines().skip_while(|line| !line.starts_with("## Not built yet")).skip(1);
    let rows = section.take_while(|line| !line.starts_with("## ")).filter(|line| line.starts_with("| SHM-"));
    rows.filter_map(|row| row.split('|').nth(1)).flat_map(numbers).collect()
}

/// Every n of an `SHM-n` in the text.
pub fn numbers(text: &str) -> Vec<u32> {
    let digits = |rest: &str| rest.split(|letter: char| !letter.is_ascii_digit()).next()?.parse().ok();
    text.split("SHM-").skip(1).filter_map(digits).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTRACT: &str = "# Title\n\nSHM-7 is mentioned.\n- **SHM-1** (S) First (really), `a | b`.\n\
        - **SHM-12** (P) Second.\n- **SHM-13** no letter\n\n## Not built yet\n\n| assertions | why |\n|---|---|\n\
        | SHM-12, SHM-14 | SHM-1 needs it |\n\n## More\n\n| SHM-1 | built |\n";

    #[test]
    fn list_items_with_a_number_and_a_source_are_assertions() {
        let first = Assertion { number: 1, text: "First (really), `a | b`.".to_owned(), is_built: true };
        let second = Assertion { number: 12, text: "Second.".to_owned(), is_built: false };
        assert_eq!(parse(CONTRACT), [first, second]);
    }

    #[test]
    fn numbers_are_found_in_any_text() {
        assert_eq!(numbers("SHM-1, SHM-23: as SHM-4x (SHM-5)"), [1, 23, 4, 5]);
        assert_eq!(numbers("SHM, SHM-, SHM-x, shm-1"), []);
    }
}
