//! Quartiles.

use serde::Serialize;

/// First quartile, median and third quartile.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Quartiles {
    /// A quarter of the values are at most this.
    pub q1: f64,
    /// The middle.
    pub median: f64,
    /// Three quarters of the values are at most this.
    pub q3: f64,
}

impl Quartiles {
    /// Of these values, interpolated linearly between neighbours; `None` of none.
    pub fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let place = share * (sorted.len().checked_sub(1)?) as f64;
            let below = *sorted.get(place.floor() as usize)?;
            let above = *sorted.get(place.ceil() as usize)?;
            Some(below + (above - below) * place.fract())
        };
        Some(Self {
            q1: at(0.25)?,
            median: at(0.5)?,
            q3: at(0.75)?,
        })
    }

    /// Each rounded to `digits` digits after the point.
    pub fn rounded(self, digits: u32) -> Self {
        let round = |value| rounded(value, digits);
        Self {
            q1: round(self.q1),
            median: round(self.median),
            q3: round(self.q3),
        }
    }
}

/// `value` with `digits` digits after the point.
pub fn rounded(value: f64, digits: u32) -> f64 {
    let scale = 10f64.powi(digits as i32);
    (value * scale).round() / scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_lie_between_neighbours() {
        let found = Quartiles::of(&[4.0, 1.0, 3.0, 2.0]).unwrap();
        assert_eq!((found.q1, found.median, found.q3), (1.75, 2.5, 3.25));
        let one = Quartiles::of(&[7.0]).unwrap();
        assert_eq!((one.q1, one.median, one.q3), (7.0, 7.0, 7.0));
        assert_eq!(Quartiles::of(&[]), None);
    }

    #[test]
    fn rounding_keeps_the_digits_asked_for() {
        assert_eq!(rounded(1.26, 1), 1.3);
        assert_eq!(rounded(1234.5, 0), 1235.0);
    }
}
