//! The tests that cite the contract, found by parsing the sources as Rust does: from the file in which a test
//! program's crate begins, along its `mod` items.
//!
//! A test is a function with the attribute `#[test]`. It cites SHM-n when a comment inside it, or right above
//! it, contains that number.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use proc_macro2::{TokenStream, TokenTree};
use syn::{Attribute, Expr, Item, ItemFn, ItemMod, Lit, Meta};

use crate::assertions::numbers;
use crate::message::Result;
use crate::sources::Sources;

/// One test cites one assertion. Ordered as the table shows them.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Citation {
    pub number: u32,
    /// `lib`, or the name of an integration test.
    pub program: String,
    /// The test's path as the test harness prints it.
    pub test: String,
    /// FILE:LINE of the function.
    pub place: String,
}

impl fmt::Display for Citation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SHM-{}: {}: {} ({})", self.number, self.program, self.test, self.place)
    }
}

/// Every citation in the library and in the integration tests.
pub fn find(sources: &Sources<'_>) -> Result<BTreeSet<Citation>> {
    let mut citations = BTreeSet::new();
    for program in sources.programs()? {
        let folder = program.file.parent().map(Path::to_owned).unwrap_or_default();
        let module = Module { file: program.file, folder, path: Vec::new() };
        read_module(sources, &program.name, module, &mut citations)?;
    }
    Ok(citations)
}

/// A module that is to be read from a file.
struct Module {
    file: PathBuf,
    /// Where the files of its child modules are.
    folder: PathBuf,
    /// Its names from the crate's root on.
    path: Vec<String>,
}

fn read_module(
    sources: &Sources<'_>,
    program: &str,
    module: Module,
    citations: &mut BTreeSet<Citation>,
) -> Result<()> {
    let text = sources.read(&module.file)?;
    let failed = |error: &dyn fmt::Display| format!("cannot parse {}: {error}", module.file.display());
    let tokens: TokenStream = text.parse().map_err(|error: proc_macro2::LexError| failed(&error))?;
    let comments = comments(&text, tokens.clone());
    let file: syn::File = syn::parse2(tokens).map_err(|error| failed(&error))?;
    let mut visitor =
        Visitor { text: &text, comments, path: module.path, found: Vec::new(), modules: Vec::new() };
    visitor.visit_items(&file.items, &mut Vec::new());
    for test in visitor.found {
        for number in test.numbers {
            citations.insert(Citation {
                number,
                program: program.to_owned(),
                test: test.path.clone(),
                place: format!("{}:{}", module.file.display(), test.line),
            });
        }
    }
    for child in visitor.modules {
        let child = locate(sources, &module.file, &module.folder, child)?;
        read_module(sources, program, child, citations)?;
    }
    Ok(())
}

/// The file of a `mod name;`: the one that `#[path]` names, else `name.rs` or `name/mod.rs`.
fn locate(sources: &Sources<'_>, parent: &Path, folder: &Path, child: Child) -> Result<Module> {
    let inline = child.inline.iter().fold(folder.to_owned(), |folder, name| folder.join(name));
    let plain = child.path.last().cloned().unwrap_or_default();
    if let Some(attribute) = child.attribute {
        // Outside an inline module it is relative to the file's own directory.
        let base = if child.inline.is_empty() { parent.parent().unwrap_or(folder) } else { &inline };
        let file = base.join(attribute);
        let folder = file.parent().map(Path::to_owned).unwrap_or_default();
        return Ok(Module { file, folder, path: child.path });
    }
    let folder = inline.join(&plain);
    let candidates = [inline.join(format!("{plain}.rs")), folder.join("mod.rs")];
    match candidates.into_iter().find(|file| sources.exists(file)) {
        Some(file) => Ok(Module { file, folder, path: child.path }),
        None => Err(format!("{}: there is no file for `mod {plain};`", parent.display())),
    }
}

/// A comment, doc comments included: where it is in the file, and its text.
struct Comment {
    bytes: Range<usize>,
    text: String,
}

/// All comments of a file: doc comments are tokens; other comments are what lies between two tokens, line by
/// line.
fn comments(text: &str, tokens: TokenStream) -> Vec<Comment> {
    let mut spans = Vec::new();
    token_ranges(tokens, &mut spans);
    spans.sort_by_key(|span| (span.start, std::cmp::Reverse(span.end)));
    let mut comments = Vec::new();
    let mut end = 0;
    let mut add = |bytes: Range<usize>| {
        let mut start = bytes.start;
        for line in text[bytes].split_inclusive('\n') {
            if !line.trim().is_empty() {
                comments.push(Comment { bytes: start..start + line.trim_end().len(), text: line.to_owned() });
            }
            start += line.len();
        }
    };
    for span in spans {
        if span.start > end {
            add(end..span.start);
        }
        // The three tokens of a doc comment have the whole comment as their span.
        let is_doc_comment = ["//", "/*"].iter().any(|start| text[span.clone()].starts_with(start));
        if is_doc_comment && span.start >= end {
            add(span.clone());
        }
        end = end.max(span.end);
    }
    add(end..text.len());
    comments
}

fn token_ranges(tokens: TokenStream, ranges: &mut Vec<Range<usize>>) {
    for token in tokens {
        match token {
            TokenTree::Group(group) => {
                ranges.push(group.span_open().byte_range());
                ranges.push(group.span_close().byte_range());
                token_ranges(group.stream(), ranges);
            }
            token => ranges.push(token.span().byte_range()),
        }
    }
}

/// A test function and the numbers that it cites.
struct Test {
    path: String,
    line: usize,
    numbers: BTreeSet<u32>,
}

/// A `mod name;` whose file is still to be read.
struct Child {
    path: Vec<String>,
    /// The inline modules around it in its file.
    inline: Vec<String>,
    /// The value of `#[path = "..."]`.
    attribute: Option<String>,
}

/// Walks one file.
struct Visitor<'a> {
    text: &'a str,
    comments: Vec<Comment>,
    path: Vec<String>,
    found: Vec<Test>,
    modules: Vec<Child>,
}

impl Visitor<'_> {
    fn visit_items(&mut self, items: &[Item], inline: &mut Vec<String>) {
        for item in items {
            match item {
                Item::Mod(module) => self.visit_module(module, inline),
                Item::Fn(function) if has_test_attribute(function) => self.add_test(function),
                _ => {}
            }
        }
    }

    fn visit_module(&mut self, module: &ItemMod, inline: &mut Vec<String>) {
        let name = module.ident.to_string();
        self.path.push(name.clone());
        match &module.content {
            Some((_, items)) => {
                inline.push(name);
                self.visit_items(items, inline);
                inline.pop();
            }
            None => self.modules.push(Child {
                path: self.path.clone(),
                inline: inline.clone(),
                attribute: module.attrs.iter().find_map(path_attribute),
            }),
        }
        self.path.pop();
    }

    fn add_test(&mut self, function: &ItemFn) {
        // From its first attribute, of which it has at least one.
        let attributes = function.attrs.iter().map(|attribute| attribute.pound_token.span.byte_range().start);
        let start = attributes.min().unwrap_or_default();
        let end = function.block.brace_token.span.close().byte_range().end;
        let inside =
            self.comments.iter().filter(|comment| comment.bytes.start >= start && comment.bytes.end <= end);
        let numbers =
            inside.chain(self.right_above(start)).flat_map(|comment| numbers(&comment.text)).collect();
        let name = function.sig.ident.to_string();
        self.found.push(Test {
            path: self.path.iter().chain([&name]).map(String::as_str).collect::<Vec<_>>().join("::"),
            line: function.sig.fn_token.span.start().line,
            numbers,
        });
    }

    /// The comments on the lines before `start`, up to the first line that is blank or has code.
    fn right_above(&self, start: usize) -> impl Iterator<Item = &Comment> {
        let mut next = start;
        let before = self.comments.iter().rev().skip_while(move |comment| comment.bytes.start >= start);
        before.take_while(move |comment| {
            let is_adjacent = self.text[comment.bytes.end..next].matches('\n').count() == 1;
            let line = self.text[..comment.bytes.start].rfind('\n').map_or(0, |newline| newline + 1);
            let is_alone = self.text[line..comment.bytes.start].trim().is_empty();
            next = comment.bytes.start;
            is_adjacent && is_alone
        })
    }
}

fn has_test_attribute(function: &ItemFn) -> bool {
    function.attrs.iter().any(|attribute| attribute.path().is_ident("test"))
}

fn path_attribute(attribute: &Attribute) -> Option<String> {
    match &attribute.meta {
        Meta::NameValue(pair) if pair.path.is_ident("path") => match &pair.value {
            Expr::Lit(literal) => match &literal.lit {
                Lit::Str(text) => Some(text.value()),
                _ => None,
            },
            _ => None,
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a project of these files cites.
    fn citations(name: &str, files: &[(&str, &str)]) -> Result<Vec<String>> {
        let root = std::env::temp_dir().join(format!("hotslot-contract-{name}-{}", std::process::id()));
        for (file, text) in [("src/lib.rs", ""), ("tests/none/data", "")].iter().chain(files) {
            let path = root.join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let found = find(&Sources::new(&root));
        std::fs::remove_dir_all(&root).unwrap();
        Ok(found?.iter().map(Citation::to_string).collect())
    }

    #[test]
    fn comments_inside_and_right_above_a_test_belong_to_it() {
        let text = r#"
// SHM-1

// SHM-3
/// SHM-4
#[test]
// SHM-5
fn first() { // SHM-6
    let text = "SHM-7"; /* SHM-8 and
    SHM-9 */
} // SHM-10
// SHM-11
fn helper() {
    // SHM-12
}
#[test]
#[should_panic(expected = "SHM-13")]
fn second() {}
// SHM-14
"#;
        let found = citations("comments", &[("tests/one.rs", text)]).unwrap();
        let numbers: Vec<&str> = found.iter().filter_map(|line| line.split(':').next()).collect();
        assert_eq!(numbers, ["SHM-3", "SHM-4", "SHM-5", "SHM-6", "SHM-8", "SHM-9"]);
        assert_eq!(found[0], "SHM-3: one: first (tests/one.rs:8)");
    }

    #[test]
    fn tests_have_the_paths_that_the_harness_gives_them() {
        let test = |name: &str| format!("#[test]\nfn {name}() {{ /* SHM-1 */ }}\n");
        let files = [
            ("src/lib.rs", format!("mod plain;\nmod folder;\n{}", test("root"))),
            (
                "src/plain.rs",
                format!("#[cfg(test)]\nmod tests {{ mod deep {{ {} }} }}\nmod child;", test("inline")),
            ),
            ("src/plain/child.rs", test("below")),
            ("src/folder/mod.rs", "#[cfg(test)]\nmod tests;".to_owned()),
            ("src/folder/tests.rs", test("beside")),
            ("tests/one.rs", format!("#[path = \"two/shared.rs\"]\nmod shared;\n{}", test("alone"))),
            ("tests/two/main.rs", "mod shared;".to_owned()),
            ("tests/two/shared.rs", test("common")),
            ("tests/crate/src/main.rs", test("unseen")),
        ];
        let files: Vec<_> = files.iter().map(|(file, text)| (*file, text.as_str())).collect();
        let expected = [
            "lib: folder::tests::beside (src/folder/tests.rs:2)",
            "lib: plain::child::below (src/plain/child.rs:2)",
            "lib: plain::tests::deep::inline (src/plain.rs:3)",
            "lib: root (src/lib.rs:4)",
            "one: alone (tests/one.rs:4)",
            "one: shared::common (tests/two/shared.rs:2)",
            "two: shared::common (tests/two/shared.rs:2)",
        ];
        assert_eq!(citations("paths", &files).unwrap(), expected.map(|line| format!("SHM-1: {line}")));
    }

    #[test]
    fn what_cannot_be_read_or_parsed_is_named() {
        let missing = citations("missing", &[("tests/one.rs", "mod gone;")]).unwrap_err();
        assert_eq!(missing, "tests/one.rs: there is no file for `mod gone;`");
        let broken = citations("broken", &[("tests/one.rs", "fn {")]).unwrap_err();
        assert!(broken.starts_with("cannot parse tests/one.rs: "), "{broken}");
    }
}
