//! Turns the line and column of a JSON error into the path of the field, `process.args[0]`.

/// One level of nesting.
enum Level {
    Object { key: Option<String> },
    Array { index: usize },
}

/// The path of the value that holds position `line`:`column` (both from 1, as serde_json counts)
/// in `json`; "the top level" outside of any field. Never fails: what can't be followed is cut off.
pub(super) fn at(json: &[u8], line: usize, column: usize) -> String {
    let end = offset(json, line, column);
    let mut levels: Vec<Level> = Vec::new();
    let mut position = 0;
    while position < end {
        match json[position] {
            b'{' => levels.push(Level::Object { key: None }),
            b'[' => levels.push(Level::Array { index: 0 }),
            b'}' | b']' if position + 1 < end => {
                levels.pop();
            }
            // The error's own closing bracket: something is missing in the object that ends here,
            // not in its last member.
            b'}' => {
                if let Some(Level::Object { key }) = levels.last_mut() {
                    *key = None;
                }
            }
            b',' if position + 1 < end => match levels.last_mut() {
                Some(Level::Object { key }) => *key = None,
                Some(Level::Array { index }) => *index += 1,
                None => {}
            },
            b'"' => {
                let start = position + 1;
                position = string_end(json, start);
                if let Some(Level::Object { key: key @ None }) = levels.last_mut() {
                    let text = json.get(start..position).unwrap_or_default();
                    *key = Some(String::from_utf8_lossy(text).chars().take(64).collect());
                }
            }
            _ => {}
        }
        position += 1;
    }
    render(&levels)
}

fn offset(json: &[u8], line: usize, column: usize) -> usize {
    let start = json
        .split_inclusive(|byte| *byte == b'\n')
        .take(line.saturating_sub(1))
        .map(<[u8]>::len)
        .sum::<usize>();
    start.saturating_add(column).min(json.len())
}

/// Index of the quote that ends the string whose text begins at `start`.
fn string_end(json: &[u8], start: usize) -> usize {
    let mut position = start;
    while position < json.len() {
        match json[position] {
            b'\\' => position += 2,
            b'"' => return position,
            _ => position += 1,
        }
    }
    json.len()
}

fn render(levels: &[Level]) -> String {
    let mut path = String::new();
    for level in levels {
        match level {
            Level::Object { key: Some(key) } => {
                if !path.is_empty() {
                    path.push('.');
                }
                path.push_str(key);
            }
            Level::Object { key: None } => {}
            Level::Array { index } => path.push_str(&format!("[{index}]")),
        }
    }
    if path.is_empty() {
        "the top level".into()
    } else {
        path
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::Spec;
    use proptest::prelude::*;

    fn path_of(json: &str) -> String {
        let error = serde_json::from_str::<Spec>(json).unwrap_err();
        at(json.as_bytes(), error.line(), error.column())
    }

    #[test]
    fn names_the_field() {
        for (json, wanted) in [
            (
                r#"{"process":{"cwd":"/","args":["sh", 5]}}"#,
                "process.args[1]",
            ),
            (
                r#"{"ociVersion":"1.0.2","hostname":7,"root":{"path":"x"}}"#,
                "hostname",
            ),
            (
                "{\n \"mounts\": [\n {\"destination\": \"/a\"},\n {\"destination\": 1}]}",
                "mounts[1].destination",
            ),
            (
                r#"{"linux":{"namespaces":[{"type":"pid"},{"type":"wrong"}]}}"#,
                "linux.namespaces[1].type",
            ),
            (r#"{"a\"{b":1, "hostname":{}}"#, "hostname"),
            (r#"{"process":{"cwd":"/","args":["sh"]}}"#, "process"),
        ] {
            assert_eq!(path_of(json), wanted, "{json}");
        }
    }

    proptest! {
        #[test]
        fn any_text_and_position_give_some_path(
            json in proptest::collection::vec(any::<u8>(), 0..200), line in 0usize..50, column in 0usize..300
        ) {
            prop_assert!(!at(&json, line, column).is_empty());
        }
    }
}
