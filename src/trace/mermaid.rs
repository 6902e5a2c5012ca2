//! A trace as a sequence diagram of Mermaid (`hotslot trace FILE --sequence mermaid`): the guest, hotslot,
//! and the back-end of each device.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::record::{Direction, Noise, Outcome, ReadOrWrite, Record, What};
use super::text;
use crate::report::clean;

/// All of it, with line feeds.
pub fn draw(records: &[Record]) -> String {
    let mut lines = "sequenceDiagram\n    participant G as guest\n    participant H as hotslot\n".to_owned();
    let mut backends: BTreeMap<&str, String> = BTreeMap::new();
    for device in records.iter().filter_map(|record| record.device.as_deref()) {
        if !backends.contains_key(device) {
            let name = format!("B{}", backends.len());
            let _ = writeln!(lines, "    participant {name} as back-end of {}", label(device));
            backends.insert(device, name);
        }
    }
    for record in records {
        let device = record.device.as_deref().unwrap_or_default();
        let backend = backends.get(device).map_or("H", String::as_str);
        for line in arrows(record, device, backend) {
            let _ = writeln!(lines, "    {line}");
        }
    }
    lines
}

fn arrows(record: &Record, device: &str, backend: &str) -> Vec<String> {
    match &record.what {
        What::Trace { .. } => Vec::new(),
        What::Message(message) => {
            let (from, to) = match message.direction {
                Direction::ToBackend => ("H", backend),
                Direction::FromBackend => (backend, "H"),
            };
            let mut lines = vec![format!("{from}->>{to}: {}", label(&text::request(message)))];
            let is_answered = message.answer.is_some() || message.result != Outcome::Done;
            if is_answered {
                let arrow = if message.result == Outcome::Done { "-->>" } else { "--x" };
                lines.push(format!("{to}{arrow}{from}: {}", label(&text::result(message))));
            }
            lines
        }
        What::Noise(Noise { bytes, reason, .. }) => {
            vec![format!("{backend}-xH: {}", label(&format!("{bytes}: {reason}")))]
        }
        What::Register(access) => {
            let arrow = if access.access == ReadOrWrite::Read { "H-->>G" } else { "G->>H" };
            vec![format!("{arrow}: {}", label(&format!("{device}: {}", text::register(access))))]
        }
        What::Event(event) => {
            vec![format!("Note over {backend}: {}", label(&text::happened(event)))]
        }
        What::LeftOut { count } => vec![format!("Note over H: {count} records are missing")],
    }
}

/// A text that ends neither a line nor a statement of Mermaid's.
fn label(text: &str) -> String {
    clean(text).replace(';', ",").replace('#', "no. ")
}
