//! What the micro benchmarks measured, as samples: `criterion` leaves a file `sample.json` for each.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::figures::Problem;

/// The samples of all benchmarks below a directory of criterion's, as lines of `GROUP@FUNCTION: NUMBER`, from
/// `GROUP/FUNCTION/new/sample.json`. A sample is the mean of many iterations.
pub fn lines(directory: &Path) -> Result<String, Problem> {
    let mut lines = String::new();
    for group in names(directory)? {
        for function in names(&directory.join(&group))? {
            let path = directory.join(&group).join(&function).join("new/sample.json");
            // `report` is no benchmark.
            if !path.exists() {
                continue;
            }
            let text = fs::read_to_string(&path).map_err(|error| Problem::Unreadable(path.clone(), error))?;
            for sample in samples(&text).ok_or(Problem::NotCriterion(path))? {
                lines += &format!("{group}@{function}: {sample:.2}\n");
            }
        }
    }
    Ok(lines)
}

/// The names in a directory, sorted; of those that are directories themselves.
fn names(directory: &Path) -> Result<Vec<String>, Problem> {
    let unreadable = |error| Problem::Unreadable(directory.to_owned(), error);
    let entries = fs::read_dir(directory).map_err(unreadable)?.collect::<Result<Vec<_>, _>>();
    let directories = entries.map_err(unreadable)?.into_iter().filter(|entry| entry.path().is_dir());
    let mut names: Vec<_> =
        directories.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    Ok(names)
}

/// Nanoseconds for an iteration, in each sample.
fn samples(text: &str) -> Option<Vec<f64>> {
    let sample: Value = serde_json::from_str(text).ok()?;
    let numbers =
        |name: &str| sample.get(name)?.as_array()?.iter().map(Value::as_f64).collect::<Option<Vec<f64>>>();
    let each: Vec<f64> =
        numbers("times")?.iter().zip(numbers("iters")?).map(|(time, count)| time / count).collect();
    (!each.is_empty()).then_some(each)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_the_time_of_one_iteration() {
        let text = r#"{"sampling_mode":"Linear","iters":[1.0,2.0,4.0],"times":[30.0,20.0,80.0]}"#;
        assert_eq!(samples(text), Some(vec![30.0, 10.0, 20.0]));
        assert_eq!(samples(r#"{"iters":[],"times":[]}"#), None);
        assert_eq!(samples("{}"), None);
    }
}
