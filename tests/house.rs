//! The house keeps its shape: which file may import which other, and how wide a line may be.
//!
//! A file imports another when it names something of it: in a `use`, in a path such as `crate::bus::Bus`, in
//! the arguments of a macro. Three things are no imports:
//!
//! - `mod x;`, which only says that there is a file;
//! - `pub use x::Name` of a module's own child: the parent hands the name on, and a file that uses it by the
//!   parent's path imports the child, where it is defined;
//! - code under `#[cfg(test)]`.
//!
//! The rules are functions of file names and texts, so that the tests at the end can show them invented
//! trees.

#![allow(clippy::unwrap_used, clippy::panic)] // All of it is tests.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use proc_macro2::{TokenStream, TokenTree};
use syn::visit::{self, Visit};

/// The first file of each crate, and the name by which other crates know it.
const CRATES: [(&str, Option<&str>); 8] = [
    ("src/lib.rs", Some("hotslot")),
    ("src/main.rs", None),
    ("src/bin/hotslot-backend/main.rs", None),
    ("guest/src/lib.rs", Some("hotslot_guest")),
    ("guest/src/main.rs", None),
    ("benches/figures/src/main.rs", None),
    ("tests/contract/src/main.rs", None),
    ("tests/support/src/lib.rs", Some("hotslot_test_support")),
];

/// Modules of the library that each other one may use.
const LEAVES: [&str; 6] = ["counter", "exit", "report", "sandbox", "size", "thread"];

/// Each other module of the library, and which of ours it may use besides the leaves: the picture in
/// `tour.md`.
const MAY_USE: [(&str, &[&str]); 13] = [
    ("arch", &["memory"]),
    ("bus", &[]),
    ("cli", &["config", "trace"]),
    ("config", &["virtio"]),
    ("devices", &["bus"]),
    ("kvm", &["bus", "memory"]),
    ("memory", &[]),
    ("picture", &["memory"]),
    ("terminal", &[]),
    ("trace", &["picture"]),
    ("vhost_user", &["config", "memory", "trace", "virtio"]),
    ("virtio", &["bus", "memory", "trace"]),
    (
        "vmm",
        &[
            "arch",
            "bus",
            "config",
            "devices",
            "kvm",
            "memory",
            "picture",
            "terminal",
            "trace",
            "vhost_user",
            "virtio",
        ],
    ),
];

/// What of the library the back-ends may use: they are programs of their own.
const FOR_BACK_ENDS: [&str; 5] = ["exit", "report", "sandbox", "size", "thread"];

/// Columns. The text of a string may be wider.
const WIDTH: usize = 110;

/// File names, as `src/bus.rs`, and what is in them.
type Files = BTreeMap<String, String>;

/// What a rule looks at.
struct House {
    files: Files,
    imports: BTreeSet<Import>,
}

impl House {
    fn of(files: Files) -> House {
        House { imports: Tree::of(&files).imports(), files }
    }
}

#[test]
fn no_file_of_ours_breaks_a_rule() {
    let house = House::of(read(&["src", "guest/src", "tests", "fuzz", "benches", "examples"]));
    let broken =
        [no_circles, one_direction, wire_is_alone, back_ends_are_apart, no_shared_text, no_wide_lines]
            .iter()
            .flat_map(|rule| rule(&house))
            .collect::<Vec<_>>();
    assert!(broken.is_empty(), "{} complaints:\n{}", broken.len(), broken.join("\n"));
}

/// The files of these directories.
fn read(directories: &[&str]) -> Files {
    fn walk(root: &Path, dir: &Path, files: &mut Files) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                if path.file_name().unwrap() != "target" {
                    walk(root, &path, files);
                }
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
                files.insert(name, fs::read_to_string(&path).unwrap());
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Files::new();
    directories.iter().for_each(|dir| walk(root, &root.join(dir), &mut files));
    files
}

// ------------------------------------------------------------------------------------------ the rules

/// No file imports itself, over others.
fn no_circles(house: &House) -> Vec<String> {
    let mut next: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for import in &house.imports {
        next.entry(&import.from).or_default().insert(&import.to);
    }
    let reached = |start: &str| {
        let mut seen = BTreeSet::new();
        let mut left: Vec<&str> = next.get(start).into_iter().flatten().copied().collect();
        while let Some(file) = left.pop() {
            if seen.insert(file) {
                left.extend(next.get(file).into_iter().flatten());
            }
        }
        seen
    };
    let reached: BTreeMap<&str, BTreeSet<&str>> = next.keys().map(|&file| (file, reached(file))).collect();
    let is_in_circle = |import: &&Import| {
        reached.get(import.to.as_str()).is_some_and(|files| files.contains(import.from.as_str()))
    };
    house.imports.iter().filter(is_in_circle).map(|import| format!("in a circle: {import}")).collect()
}

/// The library's modules use each other as [`MAY_USE`] says.
fn one_direction(house: &House) -> Vec<String> {
    let module = |file: &str| {
        let rest = file.strip_prefix("src/")?;
        let first = rest.split('/').next()?;
        let module = first.strip_suffix(".rs").unwrap_or(first);
        (!["lib", "main", "bin"].contains(&module)).then(|| module.to_owned())
    };
    let mut broken = Vec::new();
    for module in house.files.keys().filter_map(|file| module(file)).collect::<BTreeSet<_>>() {
        if !LEAVES.contains(&module.as_str()) && !MAY_USE.iter().any(|(name, _)| *name == module) {
            broken.push(format!("src/{module} is new: add it to the tour, src/tour.md, and to MAY_USE"));
        }
    }
    for import in &house.imports {
        let (Some(from), Some(to)) = (module(&import.from), module(&import.to)) else { continue };
        let allowed = MAY_USE.iter().find(|(name, _)| *name == from).map_or(&[][..], |(_, allowed)| allowed);
        let to = to.as_str();
        if from != to && !LEAVES.contains(&to) && !allowed.contains(&to) {
            broken.push(format!("{from} may not use {to}: {import}"));
        }
    }
    broken
}

/// `vhost_user::wire`, the protocol, uses nothing of ours but itself: it could be a crate.
fn wire_is_alone(house: &House) -> Vec<String> {
    let is_wire = |file: &str| file == "src/vhost_user/wire.rs" || file.starts_with("src/vhost_user/wire/");
    let broken = house.imports.iter().filter(|import| is_wire(&import.from) && !is_wire(&import.to));
    broken.map(|import| format!("wire uses nothing else of ours: {import}")).collect()
}

/// The back-ends use [`FOR_BACK_ENDS`] of the library, and nothing else of it.
fn back_ends_are_apart(house: &House) -> Vec<String> {
    let is_allowed = |file: &str| {
        FOR_BACK_ENDS
            .iter()
            .any(|module| file == format!("src/{module}.rs") || file.starts_with(&format!("src/{module}/")))
    };
    let is_wrong = |import: &&Import| {
        let (from, to) = (&import.from, &import.to);
        from.starts_with("src/bin/") && !to.starts_with("src/bin/") && !is_allowed(to)
    };
    house
        .imports
        .iter()
        .filter(is_wrong)
        .map(|import| format!("a back-end may not use this: {import}"))
        .collect()
}

/// No file is part of two crates, by `#[path]` or `include!`, and so none needs `allow(dead_code)`.
fn no_shared_text(house: &House) -> Vec<String> {
    struct Shared(Vec<String>);
    impl Visit<'_> for Shared {
        fn visit_attribute(&mut self, attribute: &syn::Attribute) {
            if attribute.path().is_ident("path") {
                self.0.push("#[path]".to_owned());
            }
            let syn::Meta::List(list) = &attribute.meta else { return };
            if list.path.is_ident("allow") && list.tokens.to_string().contains("dead_code") {
                self.0.push("allow(dead_code)".to_owned());
            }
        }
        fn visit_macro(&mut self, called: &syn::Macro) {
            if called.path.is_ident("include") {
                self.0.push("include!".to_owned());
            }
        }
    }
    let mut broken = Vec::new();
    for (file, text) in &house.files {
        let mut shared = Shared(Vec::new());
        shared.visit_file(&parse(file, text));
        broken.extend(
            shared
                .0
                .iter()
                .map(|how| format!("{file} has {how}: a file is in one crate, and all of it is used")),
        );
    }
    broken
}

/// No line is wider than [`WIDTH`], but for strings, and for tables and drawings in comments.
fn no_wide_lines(house: &House) -> Vec<String> {
    /// The lines that strings are on. To the compiler a comment for documentation is a string, too:
    /// `doc = "..."`.
    fn strings(tokens: TokenStream, lines: &mut BTreeSet<usize>) {
        let mut tokens = tokens.into_iter().peekable();
        if tokens.peek().is_some_and(|first| first.to_string() == "doc") {
            return;
        }
        for token in tokens {
            match token {
                TokenTree::Group(group) => strings(group.stream(), lines),
                TokenTree::Literal(literal) if literal.to_string().contains('"') => {
                    lines.extend(literal.span().start().line..=literal.span().end().line);
                }
                _ => {}
            }
        }
    }
    let mut broken = Vec::new();
    for (file, text) in &house.files {
        let mut is_drawing = false;
        let mut wide = BTreeSet::new();
        for (number, line) in (1..).zip(text.lines()) {
            let comment = line.trim_start().trim_start_matches("//!").trim_start_matches("///").trim_start();
            is_drawing ^= comment.starts_with("```");
            if line.chars().count() > WIDTH && !is_drawing && !comment.starts_with('|') {
                wide.insert(number);
            }
        }
        if !wide.is_empty() {
            let mut excused = BTreeSet::new();
            strings(text.parse().unwrap(), &mut excused);
            let wide = wide.difference(&excused);
            broken.extend(wide.map(|number| format!("{file}:{number} is wider than {WIDTH} columns")));
        }
    }
    broken
}

// ------------------------------------------------------------------------- what imports there are

/// File `from` names something of file `to`, by this path.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Import {
    from: String,
    to: String,
    path: String,
}

impl std::fmt::Display for Import {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{} imports {} by `{}`", self.from, self.to, self.path)
    }
}

/// A path as it is written; its last part is `*` where all names are meant.
type Written = Vec<String>;
/// A module's name: the first file of its crate, then the names on the way.
type Name = Vec<String>;

#[derive(Default)]
struct Module {
    file: String,
    /// The names that are defined in it.
    items: BTreeSet<String>,
    /// The names that it hands on, each with where it has it from.
    hands_on: Vec<(String, Written)>,
    names: BTreeSet<Written>,
}

/// All modules of all crates.
struct Tree(BTreeMap<Name, Module>);

impl Tree {
    fn of(files: &Files) -> Tree {
        let mut tree = Tree(BTreeMap::new());
        for (root, _) in CRATES {
            if let Some(text) = files.get(root) {
                let dir = root.rsplit_once('/').unwrap().0;
                tree.add(files, vec![root.to_owned()], root, dir, parse(root, text).items);
            }
        }
        tree
    }

    /// Adds a module, and those that it declares: their files are in `dir`.
    fn add(&mut self, files: &Files, name: Name, file: &str, dir: &str, items: Vec<syn::Item>) {
        let mut module = Module { file: file.to_owned(), ..Module::default() };
        for item in items {
            if let syn::Item::Mod(declared) = item {
                let is_elsewhere = declared.attrs.iter().any(|attribute| attribute.path().is_ident("path"));
                if is_for_tests(&declared.attrs) || is_elsewhere {
                    continue;
                }
                let child = declared.ident.to_string();
                let name = [&name[..], std::slice::from_ref(&child)].concat();
                let dir = format!("{dir}/{child}");
                match declared.content {
                    Some((_, items)) => self.add(files, name, file, &dir, items),
                    None => {
                        let candidates = [format!("{dir}.rs"), format!("{dir}/mod.rs")];
                        let at = candidates.iter().find(|file| files.contains_key(*file));
                        let at = at.unwrap_or_else(|| panic!("{file} declares {child}, which is no file"));
                        self.add(files, name, at, &dir, parse(at, &files[at]).items);
                    }
                }
            } else {
                module.visit_item(&item);
            }
        }
        self.0.insert(name, module);
    }

    fn imports(&self) -> BTreeSet<Import> {
        let mut imports = BTreeSet::new();
        for (name, module) in &self.0 {
            let handed_on =
                module.hands_on.iter().map(|(_, path)| path).filter(|path| !self.is_below(name, path));
            for path in module.names.iter().chain(handed_on) {
                if let Some(to) = self.find(name, path).filter(|to| *to != module.file) {
                    let (from, to, path) = (module.file.clone(), to.to_owned(), path.join("::"));
                    imports.insert(Import { from, to, path });
                }
            }
        }
        imports
    }

    /// Whether a path in a module is one into its children.
    fn is_below(&self, module: &Name, path: &Written) -> bool {
        self.start(module, path).is_some_and(|(at, _)| at.len() > module.len() && at.starts_with(module))
    }

    /// The file that a path in a module names something of; `None` if that is none of ours.
    fn find(&self, module: &Name, path: &[String]) -> Option<&str> {
        let (mut at, mut rest) = self.start(module, path)?;
        while let Some((next, others)) = rest.split_first() {
            let child = [&at[..], std::slice::from_ref(next)].concat();
            if self.0.contains_key(&child) {
                (at, rest) = (child, others);
                continue;
            }
            let here = self.0.get(&at)?;
            if !here.items.contains(next) {
                for (name, from) in &here.hands_on {
                    let is_all = name == "*" && self.defines(&at, from, next);
                    if (name == next || is_all) && self.is_below(&at, from) {
                        return self.find(&at, from);
                    }
                }
            }
            break;
        }
        self.0.get(&at).map(|module| module.file.as_str())
    }

    /// Whether the module that `from` ends in, in `module`, defines a name.
    fn defines(&self, module: &Name, from: &Written, name: &str) -> bool {
        let target = self.start(module, from).and_then(|(mut at, rest)| {
            at.extend(rest.iter().filter(|part| *part != "*").cloned());
            self.0.get(&at)
        });
        target.is_some_and(|target| target.items.contains(name))
    }

    /// Where a path in a module begins, and the rest of the path.
    fn start<'a>(&self, module: &Name, path: &'a [String]) -> Option<(Name, &'a [String])> {
        let (first, mut rest) = path.split_first()?;
        let mut at = module.clone();
        match first.as_str() {
            "crate" => at.truncate(1),
            "self" => {}
            "super" => {
                at.pop();
                while rest.first().is_some_and(|part| part == "super") {
                    at.pop();
                    rest = &rest[1..];
                }
            }
            name => {
                at.push(name.to_owned());
                if !self.0.contains_key(&at) {
                    let (root, _) = CRATES.iter().find(|(_, known)| *known == Some(name))?;
                    at = vec![(*root).to_owned()];
                }
            }
        }
        self.0.contains_key(&at).then_some((at, rest))
    }
}

fn parse(file: &str, text: &str) -> syn::File {
    syn::parse_file(text).unwrap_or_else(|error| panic!("{file}: {error}"))
}

fn is_for_tests(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let syn::Meta::List(list) = &attribute.meta else { return false };
        list.path.is_ident("cfg") && list.tokens.to_string() == "test"
    })
}

/// Collects the paths of one module.
impl<'a> Visit<'a> for Module {
    fn visit_item(&mut self, item: &'a syn::Item) {
        use syn::Item::*;
        let (attributes, name) = match item {
            Const(item) => (&item.attrs, Some(&item.ident)),
            Enum(item) => (&item.attrs, Some(&item.ident)),
            Fn(item) => (&item.attrs, Some(&item.sig.ident)),
            Macro(item) => (&item.attrs, item.ident.as_ref()),
            Static(item) => (&item.attrs, Some(&item.ident)),
            Struct(item) => (&item.attrs, Some(&item.ident)),
            Trait(item) => (&item.attrs, Some(&item.ident)),
            Type(item) => (&item.attrs, Some(&item.ident)),
            Union(item) => (&item.attrs, Some(&item.ident)),
            Impl(item) => (&item.attrs, None),
            Use(item) => (&item.attrs, None),
            _ => return visit::visit_item(self, item),
        };
        if !is_for_tests(attributes) {
            self.items.extend(name.map(ToString::to_string));
            visit::visit_item(self, item);
        }
    }

    fn visit_impl_item_fn(&mut self, item: &'a syn::ImplItemFn) {
        if !is_for_tests(&item.attrs) {
            visit::visit_impl_item_fn(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &'a syn::ItemUse) {
        let mut paths = Vec::new();
        flatten(&item.tree, &mut Vec::new(), &mut paths);
        match item.vis {
            syn::Visibility::Inherited => self.names.extend(paths.into_iter().map(|(_, path)| path)),
            _ => self.hands_on.extend(paths),
        }
    }

    fn visit_path(&mut self, path: &'a syn::Path) {
        let parts: Written = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        if parts.len() > 1 {
            self.names.insert(parts);
        }
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, called: &'a syn::Macro) {
        self.names_in(called.tokens.clone());
        visit::visit_macro(self, called);
    }

    fn visit_attribute(&mut self, attribute: &'a syn::Attribute) {
        if let syn::Meta::List(list) = &attribute.meta {
            self.names_in(list.tokens.clone());
        }
    }
}

impl Module {
    /// The paths among the arguments of a macro, which are no syntax yet.
    fn names_in(&mut self, tokens: TokenStream) {
        let mut path = Written::new();
        let mut colons = 0;
        for token in tokens {
            match token {
                TokenTree::Punct(punct) if punct.as_char() == ':' => colons += 1,
                TokenTree::Ident(part) => {
                    if colons != 2 {
                        self.name(&mut path);
                    }
                    path.push(part.to_string());
                    colons = 0;
                }
                other => {
                    self.name(&mut path);
                    colons = 0;
                    if let TokenTree::Group(group) = other {
                        self.names_in(group.stream());
                    }
                }
            }
        }
        self.name(&mut path);
    }

    fn name(&mut self, path: &mut Written) {
        let path = std::mem::take(path);
        if path.len() > 1 {
            self.names.insert(path);
        }
    }
}

/// The paths of a `use`, each with the name that it gives.
fn flatten(tree: &syn::UseTree, before: &mut Written, paths: &mut Vec<(String, Written)>) {
    let mut end = |name: String, last: String| {
        // `use a::{self}` is `use a`.
        let last = if last == "self" { None } else { Some(last) };
        paths.push((name, before.iter().cloned().chain(last).collect()));
    };
    match tree {
        syn::UseTree::Path(path) => {
            before.push(path.ident.to_string());
            flatten(&path.tree, before, paths);
            before.pop();
        }
        syn::UseTree::Name(name) => end(name.ident.to_string(), name.ident.to_string()),
        syn::UseTree::Rename(rename) => end(rename.rename.to_string(), rename.ident.to_string()),
        syn::UseTree::Glob(_) => end("*".to_owned(), "*".to_owned()),
        syn::UseTree::Group(group) => group.items.iter().for_each(|tree| flatten(tree, before, paths)),
    }
}

// ------------------------------------------------------------------------------- the rules, broken

/// An invented library: its files without `src/`, and what is in them.
fn library(files: &[(&str, &str)]) -> House {
    House::of(files.iter().map(|(name, text)| (format!("src/{name}"), (*text).to_owned())).collect())
}

#[test]
fn a_circle_of_two_files_is_found_however_they_name_each_other() {
    let circle = |memory: &str, ram: &str, window: &str| {
        let files = [("lib.rs", "pub mod memory;"), ("memory/mod.rs", memory), ("memory/ram.rs", ram)];
        no_circles(&library(&[&files[..], &[("memory/window.rs", window)]].concat())).len()
    };
    const DECLARED: &str = "pub mod ram; mod window; pub use window::Window; pub use ram::*;";
    assert_eq!(circle(DECLARED, "pub struct Ram(super::Window);", "pub struct Window;"), 0);
    for (ram, window) in [
        ("use super::window::Window; pub struct Ram;", "use crate::memory::ram::Ram; pub struct Window;"),
        ("pub struct Ram(super::Window);", "fn f(_: crate::memory::Ram) {} pub struct Window;"),
        ("use super::{Window as W}; pub struct Ram;", "pub struct Window; fn f() { super::ram::g() }"),
        ("pub struct Ram; fn f() { g!(h, super::Window::new(1)); }", "use super::ram; pub struct Window;"),
        ("pub struct Ram; mod x { use super::super::window::*; }", "pub struct Window { ram: super::Ram }"),
    ] {
        assert_eq!(circle(DECLARED, ram, window), 2, "{ram} and {window}");
    }
    // A parent that uses its child, which uses its parent.
    assert_eq!(circle("mod ram; mod window; struct Size; fn f() { ram::f() }", "use super::Size;", ""), 2);
    // What is for tests only does not count; nor does a name of somebody else's.
    let tests = "pub struct Window; #[cfg(test)] mod tests { use super::super::ram::Ram; }";
    assert_eq!(circle(DECLARED, "pub struct Ram(super::Window);", tests), 0);
    assert_eq!(circle(DECLARED, "pub struct Ram(super::Window);", "pub struct Window; use libc::ram;"), 0);
}

#[test]
fn memory_may_not_use_kvm() {
    let files = |memory, kvm| {
        let lib = ("lib.rs", "pub mod kvm; pub mod memory;");
        library(&[lib, ("kvm/mod.rs", "pub mod slots;"), ("kvm/slots.rs", kvm), ("memory.rs", memory)])
    };
    let one = "pub struct Slots;";
    assert_eq!(one_direction(&files("use crate::kvm::slots::Slots;", one)).len(), 1);
    assert_eq!(one_direction(&files("fn f() -> super::kvm::slots::Slots { todo!() }", one)).len(), 1);
    assert_eq!(one_direction(&files("fn f() {}", "use crate::memory::f; pub struct Slots;")).len(), 0);
    // A module that the table does not have.
    assert_eq!(one_direction(&library(&[("lib.rs", "mod cellar;"), ("cellar.rs", "")])).len(), 1);
}

#[test]
fn wire_may_not_use_memory() {
    let files = |message| {
        library(&[
            ("lib.rs", "pub mod memory; pub mod vhost_user;"),
            ("memory.rs", "pub struct GuestRange;"),
            ("vhost_user/mod.rs", "pub mod device; pub mod wire;"),
            ("vhost_user/device.rs", "use crate::memory::GuestRange; pub struct Device;"),
            ("vhost_user/wire/mod.rs", "pub mod connection; pub mod message;"),
            ("vhost_user/wire/connection.rs", "pub struct Connection;"),
            ("vhost_user/wire/message.rs", message),
        ])
    };
    assert_eq!(wire_is_alone(&files("use super::connection::Connection; use std::io;")).len(), 0);
    for message in [
        "use crate::memory::GuestRange;",
        "use super::super::device::Device;",
        "fn f(_: crate::memory::GuestRange) {}",
    ] {
        assert_eq!(wire_is_alone(&files(message)).len(), 1, "{message}");
    }
}

#[test]
fn a_back_end_may_not_use_the_librarys_private_parts() {
    let files = |pmem| {
        library(&[
            ("lib.rs", "pub mod memory; pub mod report;"),
            ("memory.rs", "pub struct GuestRange;"),
            ("report.rs", "pub fn with_causes() {}"),
            ("bin/hotslot-backend/main.rs", "mod pmem; mod server;"),
            ("bin/hotslot-backend/pmem.rs", pmem),
            ("bin/hotslot-backend/server.rs", "pub struct Server;"),
        ])
    };
    assert_eq!(back_ends_are_apart(&files("use hotslot::report; use crate::server::Server;")).len(), 0);
    assert_eq!(back_ends_are_apart(&files("use hotslot::memory::GuestRange;")).len(), 1);
    assert_eq!(back_ends_are_apart(&files("fn f() { hotslot::memory::g() }")).len(), 1);
    assert_eq!(back_ends_are_apart(&files("use ::hotslot::memory::GuestRange;")).len(), 1);
    assert_eq!(back_ends_are_apart(&files("fn f() { ::hotslot::memory::g() }")).len(), 1);
    assert_eq!(no_shared_text(&files("#[path = \"../../memory.rs\"] mod memory;")).len(), 1);
}

#[test]
fn a_wide_line_is_found_and_a_wide_string_is_not() {
    let (words, x) = ("and so on ".repeat(12), "x".repeat(120));
    let lines = |text: String| no_wide_lines(&library(&[("lib.rs", &text)])).len();
    assert_eq!(lines(format!("//! {words}\nfn f() {{}} // {words}\n")), 2);
    assert_eq!(lines(format!("fn f() {{\n    let {x} = 1;\n}}\n")), 1);
    assert_eq!(lines(format!("const A: &str =\n    \"{x}\";\nconst B: &str = \"a \\\n{x}\";\n")), 0);
    assert_eq!(lines(format!("const A: &str = \"http://{x}\";\n//// {x}\n")), 1);
    assert_eq!(lines(format!("//! | {words} |\n//! ```text\n//! {words}\n//! ```\n//! {words}\n")), 1);
}
