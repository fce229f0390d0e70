//! The few shapes that the project's pictures are made of, and its colours.

use std::fmt::Write as _;

/// A pale blue.
pub const PALE: &str = "#a9c4e6";
/// A dark blue.
pub const DARK: &str = "#2f5d9b";
/// For what is as it should be.
pub const GOOD: &str = "#177245";
/// For what is not.
pub const BAD: &str = "#b3261e";
/// For words.
pub const INK: &str = "#111111";
/// For words that say less.
pub const GREY: &str = "#555555";
/// For the numbers of an axis.
pub const AXIS: &str = "#777777";
/// For the lines of a grid.
pub const GRID: &str = "#e5e5e5";

/// A picture in the making.
#[derive(Clone, Debug)]
pub struct Svg(String);

impl Svg {
    /// A white page of this size.
    pub fn new(width: f64, height: f64) -> Self {
        Self(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"Helvetica, Arial, sans-serif\" font-size=\"13\">\n\
             <rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>\n"
        ))
    }

    /// Adds an element as it is.
    pub fn put(&mut self, element: &str) {
        self.0.push_str(element);
        self.0.push('\n');
    }

    /// Words at a point; `anchor` is "start", "middle" or "end".
    pub fn text(&mut self, x: f64, y: f64, anchor: &str, fill: &str, size: u32, words: &str) {
        let words = escaped(words);
        self.put(&format!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" fill=\"{fill}\" font-size=\"{size}\">{words}</text>"
        ));
    }

    /// A filled rectangle.
    pub fn rect(&mut self, x: f64, y: f64, width: f64, height: f64, fill: &str) {
        self.put(&format!(
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{fill}\"/>"
        ));
    }

    /// A line from one point to another.
    pub fn line(&mut self, from: (f64, f64), to: (f64, f64), stroke: &str) {
        self.put(&format!(
            "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"{stroke}\"/>",
            from.0, from.1, to.0, to.1
        ));
    }

    /// A dashed line.
    pub fn dashed(&mut self, from: (f64, f64), to: (f64, f64), stroke: &str) {
        self.put(&format!(
            "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"{stroke}\" stroke-dasharray=\"3 3\"/>",
            from.0, from.1, to.0, to.1
        ));
    }

    /// A line through many points.
    pub fn path(&mut self, points: &[(f64, f64)], stroke: &str) {
        let mut list = String::new();
        for (x, y) in points {
            // Writing to a String cannot fail.
            let _ = write!(list, "{x:.1},{y:.1} ");
        }
        self.put(&format!(
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{stroke}\" stroke-width=\"1.5\"/>",
            list.trim_end()
        ));
    }

    /// The whole picture.
    pub fn finish(mut self) -> String {
        self.0.push_str("</svg>\n");
        self.0
    }
}

fn escaped(words: &str) -> String {
    let mut escaped = String::new();
    for letter in words.chars() {
        match letter {
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '&' => escaped.push_str("&amp;"),
            other => escaped.push(other),
        }
    }
    escaped
}

/// 12345 as 12,345.
pub fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_by_thousands() {
        assert_eq!([0, 999, 1000, 1_234_567].map(thousands), ["0", "999", "1,000", "1,234,567"]);
    }

    #[test]
    fn words_cannot_break_out_of_a_picture() {
        let mut svg = Svg::new(10.0, 10.0);
        svg.text(1.0, 2.0, "start", INK, 10, "a < b & c > d");
        let picture = svg.finish();
        assert!(picture.contains(">a &lt; b &amp; c &gt; d</text>") && picture.ends_with("</svg>\n"));
    }
}
