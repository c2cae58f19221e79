//! The templates in containerd's formatted mounts: `{{ mount 0 }}` and `{{ overlay 1 3 }}` stand
//! for the places at which earlier mounts of the same list are.

use std::path::PathBuf;

/// `text` with its templates filled in from `places`; why not, otherwise.
pub(super) fn expand(text: &str, places: &[PathBuf]) -> Result<String, String> {
    let mut whole = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("{{") {
        let (inside, after) = after
            .split_once("}}")
            .ok_or_else(|| format!("{text:?}: \"{{{{\" without \"}}}}\""))?;
        whole.push_str(before);
        whole.push_str(&fill(inside, places).map_err(|why| format!("{text:?}: {why}"))?);
        rest = after;
    }
    whole.push_str(rest);
    Ok(whole)
}

fn fill(inside: &str, places: &[PathBuf]) -> Result<String, String> {
    let mut words = inside.split_whitespace();
    let name = words.next().unwrap_or_default();
    let numbers: Result<Vec<usize>, _> = words.map(str::parse).collect();
    let numbers = numbers.map_err(|_| format!("{inside:?} has an index that is no number"))?;
    let place = |index: usize| {
        let place = places.get(index).map(|path| path.display().to_string());
        place.ok_or_else(|| format!("there is no earlier mount {index}"))
    };
    match (name, numbers.as_slice()) {
        ("mount", [index]) => place(*index),
        ("overlay", [first, last]) => {
            let ends = |index: &usize| place(*index).map(drop);
            ends(first).and_then(|()| ends(last))?;
            let layers: Result<Vec<_>, _> = if first <= last {
                (*first..=*last).map(place).collect()
            } else {
                (*last..=*first).rev().map(place).collect()
            };
            Ok(layers?.join(":"))
        }
        _ => Err(format!("{inside:?} is not known here")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn places() -> Vec<PathBuf> {
        ["/s/0", "/s/1", "/s/2"].map(PathBuf::from).into()
    }

    #[test]
    fn templates_are_filled_in() {
        let expand = |text: &str| expand(text, &places());
        assert_eq!(
            expand("upperdir={{ mount 0 }}/upper").unwrap(),
            "upperdir=/s/0/upper"
        );
        assert_eq!(
            expand("lowerdir={{ overlay 1 2 }}").unwrap(),
            "lowerdir=/s/1:/s/2"
        );
        assert_eq!(expand("{{overlay 2 0}}").unwrap(), "/s/2:/s/1:/s/0");
        assert_eq!(expand("plain").unwrap(), "plain");
        for bad in [
            "{{ mount 3 }}",
            "{{ mount }}",
            "{{ source 0 }}",
            "{{ mount 0",
            "{{ overlay 0 9 }}",
            "{{ mount -1 }}",
        ] {
            assert!(expand(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_expanded_or_refused(text in "[a-z{} 0-9]{0,40}") {
            if let Ok(whole) = expand(&text, &places()) {
                prop_assert!(!whole.contains("{{"));
            }
        }
    }
}
