//! Lines in a coordinate system, as SVG.

/// One plot. Both axes begin at 0.
pub(super) struct Plot<'p> {
    pub(super) title: &'p str,
    pub(super) x: &'p str,
    pub(super) y: &'p str,
    pub(super) lines: Vec<Line<'p>>,
}

/// Points joined in their order.
pub(super) struct Line<'p> {
    pub(super) name: &'p str,
    pub(super) points: Vec<(f64, f64)>,
}

const WIDTH: f64 = 480.0;
const HEIGHT: f64 = 336.0;
/// Around the coordinate system.
const LEFT: f64 = 64.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 52.0;
const BOTTOM: f64 = 52.0;
/// Dark enough for a white page, light enough for a black one.
const COLOURS: [&str; 3] = ["#3b78c2", "#c2603b", "#4a9c5d"];

impl Plot<'_> {
    pub(super) fn svg(&self) -> String {
        let all = || self.lines.iter().flat_map(|line| &line.points);
        let top = |f: fn(&(f64, f64)) -> f64| all().map(f).fold(0.0, f64::max);
        let mut page =
            Page { xs: ticks(top(|p| p.0)), ys: ticks(top(|p| p.1)), svg: String::new() };
        page.put(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
             font-family=\"sans-serif\" font-size=\"12\" fill=\"#777\">"
        ));
        page.frame(self);
        page.legend(&self.lines);
        for (line, colour) in self.lines.iter().zip(COLOURS.iter().cycle()) {
            page.curve(line, colour);
        }
        page.put("</svg>".to_owned());
        page.svg
    }
}

/// What is drawn so far, and where the numbers lie.
struct Page {
    xs: Vec<f64>,
    ys: Vec<f64>,
    svg: String,
}

impl Page {
    fn x_at(&self, x: f64) -> f64 {
        LEFT + x / self.xs[self.xs.len() - 1] * (WIDTH - LEFT - RIGHT)
    }

    fn y_at(&self, y: f64) -> f64 {
        HEIGHT - BOTTOM - y / self.ys[self.ys.len() - 1] * (HEIGHT - TOP - BOTTOM)
    }

    fn put(&mut self, element: String) {
        self.svg += &element;
        self.svg += "\n";
    }

    fn text(&mut self, [x, y]: [f64; 2], anchor: &str, words: &str) {
        let words = words.replace('&', "&amp;").replace('<', "&lt;");
        let at = format!("x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\"");
        self.put(format!("<text {at}>{words}</text>"));
    }

    /// Title, axes and their numbers.
    fn frame(&mut self, plot: &Plot<'_>) {
        self.text([WIDTH / 2.0, 20.0], "middle", plot.title);
        self.text([(LEFT + WIDTH - RIGHT) / 2.0, HEIGHT - 12.0], "middle", plot.x);
        self.text([LEFT - 8.0, TOP - 16.0], "end", plot.y);
        for x in self.xs.clone() {
            self.text([self.x_at(x), HEIGHT - BOTTOM + 18.0], "middle", &number(x));
        }
        for y in self.ys.clone() {
            let (at, right) = (self.y_at(y), WIDTH - RIGHT);
            self.text([LEFT - 8.0, at + 4.0], "end", &number(y));
            self.put(format!("<path d=\"M{LEFT} {at:.1}H{right}\" stroke=\"#7774\"/>"));
        }
    }

    /// The lines' names above the coordinate system, where no line runs. One alone has its name in the title.
    fn legend(&mut self, lines: &[Line<'_>]) {
        const TEXT_WIDTH: f64 = 7.0;
        let mut x = LEFT + 4.0;
        for (line, colour) in lines.iter().zip(COLOURS.iter().cycle()).filter(|_| lines.len() > 1) {
            let y = TOP - 20.0;
            self.put(format!("<path d=\"M{x} {y}h16\" stroke=\"{colour}\" stroke-width=\"2\"/>"));
            self.text([x + 22.0, y + 4.0], "start", line.name);
            x += 38.0 + TEXT_WIDTH * line.name.chars().count() as f64;
        }
    }

    /// A line and its points.
    fn curve(&mut self, line: &Line<'_>, colour: &str) {
        let stroke = format!("fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"");
        let at = |(x, y): &(f64, f64)| [self.x_at(*x), self.y_at(*y)];
        let points: Vec<[f64; 2]> = line.points.iter().map(at).collect();
        let path: Vec<String> = points.iter().map(|[x, y]| format!("{x:.1},{y:.1}")).collect();
        self.put(format!("<polyline points=\"{}\" {stroke}/>", path.join(" ")));
        for [x, y] in points {
            let at = format!("cx=\"{x:.1}\" cy=\"{y:.1}\"");
            self.put(format!("<circle {at} r=\"3\" fill=\"{colour}\"/>"));
        }
    }
}

/// From 0 to `top` or a little beyond, in four to ten steps of 1, 2 or 5 times a power of ten.
fn ticks(top: f64) -> Vec<f64> {
    if !top.is_finite() || top <= 0.0 {
        return vec![0.0, 1.0];
    }
    let power = 10f64.powf((top / 5.0).log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|n| n * power);
    let step = *steps.iter().find(|step| top / **step <= 6.0).unwrap_or(&steps[3]);
    (0..=(top / step).ceil() as usize).map(|i| i as f64 * step).collect()
}

fn number(x: f64) -> String {
    let rounded = (x * 1e6).round() / 1e6;
    format!("{rounded}")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The number in ` name="number"`.
    fn attribute(element: &str, name: &str) -> f64 {
        let rest = element.split(&format!(" {name}=\"")).nth(1).expect("the attribute");
        rest.split('"').next().and_then(|n| n.parse().ok()).expect("a number")
    }

    #[test]
    fn ticks_reach_the_top_and_are_few() {
        for top in [0.003, 0.9, 1.0, 7.0, 64.0, 1536.0, 99_999.0] {
            let ticks = ticks(top);
            assert!((3..=8).contains(&ticks.len()), "{top}: {ticks:?}");
            assert!(
                *ticks.last().unwrap() >= top && ticks[ticks.len() - 2] < top,
                "{top}: {ticks:?}"
            );
        }
        assert_eq!(ticks(0.0), [0.0, 1.0]);
    }

    #[test]
    fn every_point_is_drawn_within_the_page() {
        let points = vec![(1.0, 10.0), (8.0, 75.0)];
        let lines = ["a < b", "c"].map(|name| Line { name, points: points.clone() });
        let svg = Plot { title: "t", x: "x", y: "y", lines: lines.into() }.svg();
        let circles: Vec<&str> = svg.lines().filter(|line| line.contains("<circle")).collect();
        assert_eq!(circles.len(), 4);
        for circle in circles {
            let (x, y) = (attribute(circle, "cx"), attribute(circle, "cy"));
            assert!((LEFT..=WIDTH - RIGHT).contains(&x), "{circle}");
            assert!((TOP..=HEIGHT - BOTTOM).contains(&y), "{circle}");
        }
        assert!(svg.contains("a &lt; b") && svg.ends_with("</svg>\n"), "{svg}");
    }

    #[test]
    fn names_stand_above_every_line() {
        let lines = ["a", "b"].map(|name| Line { name, points: vec![(0.0, 5.0), (1.0, 5.0)] });
        let svg = Plot { title: "t", x: "x", y: "y", lines: lines.into() }.svg();
        let highest = svg.lines().filter(|l| l.contains("<circle")).map(|l| attribute(l, "cy"));
        let highest = highest.fold(f64::INFINITY, f64::min);
        let names = svg.lines().filter(|l| l.ends_with(">a</text>") || l.ends_with(">b</text>"));
        let names: Vec<f64> = names.map(|l| attribute(l, "y")).collect();
        assert!(names.len() == 2 && names.iter().all(|y| *y < highest), "{names:?}, {highest}");
    }
}
