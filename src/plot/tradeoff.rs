//! The tasks' metric and KL against the audited compression ratio.

use super::canvas::{Area, Drawn, FONT, Figure, axes, fitting, legend, said, series_color};
use super::series::{Estimate, GREY, Point, SweepTable, prefix_label, series_name};
use plotters::coord::ranged1d::ValueFormatter;
use plotters::prelude::*;

pub struct Tradeoff<'a> {
    pub table: &'a SweepTable,
}

/// KL below this is drawn at the bottom of the log axis: that of the controls is zero, or rounding.
const KL_FLOOR: f64 = 1e-4;

impl Figure for Tradeoff<'_> {
    fn size(&self) -> (u32, u32) {
        (1200, 560)
    }

    fn draw<DB: DrawingBackend>(&self, root: &Area<DB>) -> Drawn {
        let t = self.table;
        let title = format!("Answer quality against compression ({})", t.title);
        let root = root.margin(8, 0, 0, 0).titled(&title, fitting(root, &title, 22)).map_err(said)?;
        let (left, right) = root.split_horizontally(600);
        let prefixes = t.prefixes().into_iter().map(|(p, _)| p);
        let all: Vec<&Point> = t.fusion.iter().flatten().chain([&t.none]).chain(prefixes).collect();
        let most = all.iter().map(|p| p.cr_audited).fold(1.0, f64::max);
        let x = 0.8..most * 1.08;
        let ratio = "audited compression ratio (whole cache, 16 bits / stored bits)";

        let score_top = all.iter().map(|p| p.score.high).fold(0.1, f64::max) * 1.3;
        let mut panel = ChartBuilder::on(&left);
        let mut panel = margins(&mut panel).build_cartesian_2d(x.clone(), 0.0..score_top).map_err(said)?;
        axes(&mut panel, ratio, &format!("{} (mean, 95 % interval)", t.metric))?;
        self.panel(&mut panel, |p| p.score, (0.0, score_top), t.none.score.mid)?;

        let kl_top = all.iter().map(|p| p.kl.high).fold(1e-2, f64::max) * 6.0;
        let mut panel = ChartBuilder::on(&right);
        let mut panel =
            margins(&mut panel).build_cartesian_2d(x, (KL_FLOOR..kl_top).log_scale()).map_err(said)?;
        axes(&mut panel, ratio, "KL from no fusion, nats a token (log; zero at bottom)")?;
        self.panel(&mut panel, |p| p.kl, (KL_FLOOR, kl_top), f64::NAN)
    }
}

fn margins<'a, 'b, DB: DrawingBackend>(
    chart: &'b mut ChartBuilder<'a, 'a, DB>,
) -> &'b mut ChartBuilder<'a, 'a, DB> {
    chart.margin(12).x_label_area_size(52).y_label_area_size(70)
}

impl Tradeoff<'_> {
    /// Curves with intervals and thresholds, the controls, and lines at exact prefix sharing and at `level`.
    fn panel<'a, DB, Y>(
        &self,
        chart: &mut ChartContext<'a, DB, Cartesian2d<plotters::coord::types::RangedCoordf64, Y>>,
        quality: fn(&Point) -> Estimate,
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
            let right = chart.x_range().end;
            let line = [(chart.x_range().start, level), (right, level)];
            chart.draw_series(DashedLineSeries::new(line, 2, 4, GREY.stroke_width(1))).map_err(said)?;
        }
        // Intervals of many series hide each other: then they are pale.
        let shade = if t.fusion.len() > 2 { 0.4 } else { 1.0 };
        let mut taken: Vec<(i32, i32, i32)> = Vec::new();
        for (n, series) in t.fusion.iter().enumerate() {
            let color = series_color(n).to_rgba();
            let at = |p: &Point| (p.cr_audited, clip(quality(p).mid));
            chart
                .draw_series(LineSeries::new(series.iter().map(at), color.stroke_width(2)))
                .map_err(said)?
                .label(series_name(&series[0]))
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], color.stroke_width(3)));
            let bars = series.iter().filter(|p| quality(p).mid.is_finite()).map(|p| {
                let q = quality(p);
                ErrorBar::new_vertical(
                    p.cr_audited,
                    clip(q.low),
                    clip(q.mid),
                    clip(q.high),
                    color.mix(shade).filled(),
                    if shade < 1.0 { 4 } else { 8 },
                )
            });
            chart.draw_series(bars).map_err(said)?;
            chart.draw_series(series.iter().map(|p| Circle::new(at(p), 4, color.filled()))).map_err(said)?;
            for (i, p) in series.iter().enumerate() {
                // Alternating sides: neighbours lie close where the curve is steep.
                let offset = if i % 2 == 0 { (9, -16) } else { (9, 5) };
                // A label that another one would cover says nothing.
                let (x, y) = chart.plotting_area().map_coordinate(&at(p));
                let (x, y) = (x + offset.0, y + offset.1);
                let right = x + 8 * p.name.len() as i32;
                if taken.iter().any(|&(u, end, v)| x < end && u < right && (v - y).abs() < 14) {
                    continue;
                }
                taken.push((x, right, y));
                let label = Text::new(p.name.clone(), offset, (FONT, 14).into_font().color(&color));
                chart.draw_series(std::iter::once(EmptyElement::at(at(p)) + label)).map_err(said)?;
            }
        }
        // On the axis of KL both lie at the bottom, where the legend may cover what is right: there the name of the one stands
        // at the top of its line.
        let prefix = t.prefix().map(|p| (p, "prefix", if level.is_finite() { Some(5) } else { None }));
        for (p, name, below) in [Some((&t.none, "no fusion", Some(-18))), prefix].into_iter().flatten() {
            let q = quality(p);
            if !q.mid.is_finite() {
                continue;
            }
            let (low, mid, high) = (clip(q.low), clip(q.mid), clip(q.high));
            let mark = ErrorBar::new_vertical(p.cr_audited, low, mid, high, BLACK.filled(), 8);
            chart.draw_series([mark]).map_err(said)?;
            let (at, below) = below.map_or((top, 4), |below| (mid, below));
            let label = Text::new(name, (7, below), (FONT, 14).into_font().color(&BLACK));
            chart.draw_series(std::iter::once(EmptyElement::at((p.cr_audited, at)) + label)).map_err(said)?;
        }
        let position =
            if level.is_finite() { SeriesLabelPosition::UpperRight } else { SeriesLabelPosition::LowerRight };
        legend(chart, position)
    }
}
