//! The tasks' metric and KL against the audited compression ratio.

use super::canvas::{Area, Drawn, FONT, Figure, axes, fitting, legend, said, series_color};
use super::dodge::{Box, Taken, place};
use super::family::Family;
use super::series::{Estimate, GREY, Point, SweepTable, prefix_label};
use plotters::coord::combinators::{BindKeyPoints, LogCoord, WithKeyPoints};
use plotters::coord::ranged1d::ValueFormatter;
use plotters::prelude::*;

pub struct Tradeoff<'a> {
    pub table: &'a SweepTable,
}

/// The log axis ends here at the latest: the KL of the controls is zero, or rounding.
const KL_FLOOR: f64 = 1e-4;
/// From so many series on colours are those of families, and what others beat is pale.
const MANY: usize = 10;
/// What every name begins with where all comes after exact prefix sharing.
const SHARED: &str = "prefix+";
/// Up to so many series every point says where its dial stands; more would hide each other.
const FEW: usize = 4;

type Ratio = WithKeyPoints<LogCoord<f64>>;

impl Figure for Tradeoff<'_> {
    fn size(&self) -> (u32, u32) {
        (1200, 560)
    }

    fn draw<DB: DrawingBackend>(&self, root: &Area<DB>) -> Drawn {
        let t = self.table;
        let first = t.fusion.first().map_or("", |s| &s[0].label[..]);
        let after = if self.label(first) == first { "" } else { ", after exact prefix sharing" };
        let title = format!("Answer quality against compression{after} ({})", t.title);
        let root = root.margin(8, 0, 0, 0).titled(&title, fitting(root, &title, 22)).map_err(said)?;
        let (left, right) = root.split_horizontally(600);
        let prefixes = t.prefixes().into_iter().map(|(p, _)| p);
        let all: Vec<&Point> = t.fusion.iter().flatten().chain([&t.none]).chain(prefixes).collect();
        let least = all.iter().map(|p| p.cr_audited).fold(1.0, f64::min) * 0.95;
        let bounds = t.bound.iter().flatten().map(|(cr, _)| *cr);
        let most = all.iter().map(|p| p.cr_audited).chain(bounds).fold(1.2, f64::max);
        // Room for the names of the curves that end furthest to the right.
        let x = least..most * (most / least).powf(0.22);
        let ratio = "audited compression ratio (16 bits / bits stored, log)";

        let score_top = all.iter().map(|p| p.score.high).fold(0.1, f64::max) * 1.25;
        let mut panel = ChartBuilder::on(&left);
        let mut panel =
            margins(&mut panel).build_cartesian_2d(log_ratio(&x), 0.0..score_top).map_err(said)?;
        axes(&mut panel, ratio, &format!("{} (mean, 95 % interval)", t.metric))?;
        self.panel(&mut panel, |p| p.score, &x, (0.0, score_top), t.none.score.mid)?;

        let seen = t.fusion.iter().flatten().map(|p| p.kl.mid).filter(|kl| *kl > KL_FLOOR);
        let floor = (seen.fold(3e-2, f64::min) / 3.0).max(KL_FLOOR);
        let kl_top = all.iter().map(|p| p.kl.high).fold(1e-2, f64::max) * 3.0;
        let mut panel = ChartBuilder::on(&right);
        let mut panel = margins(&mut panel)
            .build_cartesian_2d(log_ratio(&x), (floor..kl_top).log_scale())
            .map_err(said)?;
        axes(&mut panel, ratio, "KL from no encoding, nats per token (log; zero at bottom)")?;
        self.panel(&mut panel, |p| p.kl, &x, (floor, kl_top), f64::NAN)
    }
}

/// A log axis that is marked at 1, 1.5, 2, 3, 5, 7 times powers of ten, or fewer of these where they would be crowded.
fn log_ratio(range: &std::ops::Range<f64>) -> Ratio {
    let decades = (range.end / range.start).log10();
    let steps: &[f64] = if decades < 1.0 {
        &[1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0]
    } else {
        &[1.0, 2.0, 3.0, 5.0, 7.0]
    };
    let steps = if decades > 2.0 { &[1.0, 2.0, 5.0] } else { steps };
    let marks = (-1..6).flat_map(|k| steps.iter().map(move |s| s * 10f64.powi(k)));
    let marks: Vec<f64> = marks.filter(|m| range.contains(m)).collect();
    (range.start..range.end).log_scale().with_key_points(marks)
}

fn margins<'a, 'b, DB: DrawingBackend>(
    chart: &'b mut ChartBuilder<'a, 'a, DB>,
) -> &'b mut ChartBuilder<'a, 'a, DB> {
    chart.margin(12).x_label_area_size(52).y_label_area_size(70)
}

/// Pixels of a text of the small font.
fn wide(text: &str) -> i32 {
    8 * text.chars().count() as i32
}

impl Tradeoff<'_> {
    fn many(&self) -> bool {
        self.table.fusion.len() >= MANY
    }

    /// Series in the order in which they are drawn: those that nothing beats last, on top.
    fn order(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.table.fusion.len()).collect();
        if self.many() {
            order.sort_by_key(|&n| self.table.on_front(n));
        }
        order
    }

    fn hue(&self, n: usize) -> RGBColor {
        if self.many() { self.table.families[n].color() } else { series_color(n) }
    }

    /// Of a curve.
    fn color(&self, n: usize) -> RGBAColor {
        let pale = self.many() && !self.table.on_front(n);
        self.hue(n).mix(if pale { 0.35 } else { 1.0 })
    }

    /// A series' name without what all have in common.
    fn label<'b>(&self, label: &'b str) -> &'b str {
        let shared = |s: &Vec<Point>| s[0].label.starts_with(SHARED);
        let all = self.many() && self.table.fusion.iter().all(shared);
        label.strip_prefix(SHARED).filter(|_| all).unwrap_or(label)
    }

    /// Curves with intervals and names, the controls, and lines at exact prefix sharing and at `level`.
    fn panel<'a, DB, Y>(
        &self,
        chart: &mut ChartContext<'a, DB, Cartesian2d<Ratio, Y>>,
        quality: fn(&Point) -> Estimate,
        x: &std::ops::Range<f64>,
        (bottom, top): (f64, f64),
        level: f64,
    ) -> Drawn
    where
        DB: DrawingBackend + 'a,
        Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
    {
        let t = self.table;
        let clip = |y: f64| y.clamp(bottom, top);
        for (n, (prefix, series)) in t.prefixes().into_iter().enumerate() {
            let color = series.map_or(GREY, series_color);
            let cr = prefix.cr_audited;
            let line = DashedLineSeries::new([(cr, bottom), (cr, top)], 6, 4, color.stroke_width(2));
            let drawn = chart.draw_series(line).map_err(said)?;
            if n == 0 {
                drawn
                    .label(prefix_label(t, "lossless"))
                    .legend(|(x, y)| PathElement::new([(x, y), (x + 22, y)], GREY.stroke_width(2)));
            }
        }
        if level.is_finite() {
            let line = [(x.start, level), (x.end, level)];
            let drawn =
                chart.draw_series(DashedLineSeries::new(line, 2, 4, GREY.stroke_width(1))).map_err(said)?;
            drawn
                .label("no encoding")
                .legend(|(x, y)| PathElement::new([(x, y), (x + 22, y)], GREY.stroke_width(1)));
        }
        let at = |p: &Point| (p.cr_audited, clip(quality(p).mid));
        // Intervals of many series hide each other: then they are pale.
        let shade = if t.fusion.len() > 2 { 0.35 } else { 1.0 };
        for n in self.order() {
            let (series, color) = (&t.fusion[n], self.color(n));
            chart.draw_series(LineSeries::new(series.iter().map(at), color.stroke_width(2))).map_err(said)?;
            let barred = !self.many() || t.on_front(n);
            let bars = series.iter().filter(|p| barred && quality(p).mid.is_finite()).map(|p| {
                let q = quality(p);
                let (low, mid, high) = (clip(q.low), clip(q.mid), clip(q.high));
                let style = color.mix(shade).filled();
                ErrorBar::new_vertical(p.cr_audited, low, mid, high, style, if shade < 1.0 { 4 } else { 8 })
            });
            chart.draw_series(bars).map_err(said)?;
            chart.draw_series(series.iter().map(|p| Circle::new(at(p), 4, color.filled()))).map_err(said)?;
            if let Some(bound) = t.bound.get(n).filter(|b| level.is_nan() && !b.is_empty()) {
                let line = bound.iter().map(|&(cr, kl)| (cr, clip(kl)));
                let drawn = chart.draw_series(DashedLineSeries::new(line, 3, 3, color.stroke_width(2)));
                drawn
                    .map_err(said)?
                    .label("dotted: at the Gaussian bound of its predictors")
                    .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], color.stroke_width(1)));
            }
        }
        for family in
            Family::ALL.into_iter().filter(|f| self.many() && level.is_finite() && t.families.contains(f))
        {
            let color = family.color();
            let nothing = std::iter::empty::<Circle<(f64, f64), i32>>();
            let drawn = chart.draw_series(nothing).map_err(said)?;
            drawn
                .label(family.name())
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], color.stroke_width(3)));
        }
        self.names(chart, &at)?;
        legend(
            chart,
            if level.is_finite() { SeriesLabelPosition::UpperRight } else { SeriesLabelPosition::LowerRight },
        )
    }

    /// Names of curves beside their last points, and where dials stand, each where it covers nothing that was drawn before.
    fn names<'a, DB, Y>(
        &self,
        chart: &mut ChartContext<'a, DB, Cartesian2d<Ratio, Y>>,
        at: &impl Fn(&Point) -> (f64, f64),
    ) -> Drawn
    where
        DB: DrawingBackend + 'a,
        Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
    {
        let t = self.table;
        let area = chart.plotting_area();
        let pixel = |p: &Point| area.map_coordinate(&at(p));
        let drawn = |p: &&Point| at(p).1.is_finite();
        let mut taken = Taken::default();
        for series in &t.fusion {
            let at: Vec<(i32, i32)> = series.iter().filter(drawn).map(pixel).collect();
            taken.marks.extend(at.iter().map(|at| Box::around(*at, 4)));
            at.windows(2).for_each(|ends| taken.line(ends[0], ends[1]));
        }
        let (xs, ys) = area.get_pixel_range();
        let frame = Box { left: xs.start, top: ys.start, right: xs.end, bottom: ys.end };
        let mut write = |text: &str, p: &Point, size: u32, color: RGBAColor, needed: bool| -> Drawn {
            let high = size as i32;
            let scale = wide(text) * high / 14;
            let found = place(pixel(p), (scale, high), &frame, &taken, needed);
            let Some(found) = found else { return Ok(()) };
            let offset = (found.left - pixel(p).0, found.top - pixel(p).1);
            taken.marks.push(found);
            // A name that had to go far is tied to its point.
            let (x, y) = found.nearest(pixel(p));
            let (dx, dy) = (x - pixel(p).0, y - pixel(p).1);
            if dx * dx + dy * dy > 18 * 18 {
                let line = PathElement::new([(0, 0), (dx, dy)], color.mix(0.6).stroke_width(1));
                area.draw(&(EmptyElement::at(at(p)) + line)).map_err(said)?;
            }
            let label = Text::new(text.to_owned(), offset, (FONT, size).into_font().color(&color));
            area.draw(&(EmptyElement::at(at(p)) + label)).map_err(said)
        };
        let size = if t.fusion.len() > FEW { 12 } else { 14 };
        // Those that nothing beats first: they find room.
        for n in self.order().into_iter().rev() {
            let series = &t.fusion[n];
            let last = series.iter().filter(drawn).max_by(|a, b| a.cr_audited.total_cmp(&b.cr_audited));
            if let Some(last) = last {
                write(self.label(&last.label), last, size, self.hue(n).to_rgba(), true)?;
            }
        }
        for (n, series) in t.fusion.iter().enumerate().filter(|_| t.fusion.len() <= FEW) {
            for p in series.iter().filter(drawn) {
                write(&p.name, p, 12, self.hue(n).to_rgba(), false)?;
            }
        }
        Ok(())
    }
}
