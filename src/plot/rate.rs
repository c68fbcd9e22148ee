//! Compression ratio against the threshold: the paper's figure beside the audited one.

use super::canvas::{Area, Drawn, Figure, axes, fitting, legend, said, series_color};
use super::series::{GREY, Point, SweepTable, prefix_label};
use plotters::prelude::*;

/// A table's fusing series that have such a rule.
pub struct Rate<'a> {
    pub table: &'a SweepTable,
    /// The dial on the axis.
    pub dial: &'a str,
}

impl Rate<'_> {
    fn series(&self) -> impl Iterator<Item = &[Point]> {
        self.table.fusion.iter().map(Vec::as_slice).filter(|s| self.at(&s[0]).is_some())
    }

    fn at(&self, point: &Point) -> Option<f64> {
        point.dial.as_ref().filter(|(name, _)| name == self.dial).map(|(_, at)| *at)
    }
}

impl Figure for Rate<'_> {
    fn size(&self) -> (u32, u32) {
        (900, 560)
    }

    fn draw<DB: DrawingBackend>(&self, root: &Area<DB>) -> Drawn {
        let t = self.table;
        let at = |p: &Point| self.at(p).unwrap_or(f64::NAN);
        let points: Vec<&Point> = self.series().flatten().collect();
        let low = points.iter().map(|p| at(p)).fold(f64::INFINITY, f64::min);
        let high = points.iter().map(|p| at(p)).fold(f64::NEG_INFINITY, f64::max);
        let prefixes = t.prefixes();
        let ratios = points.iter().map(|p| p.cr_paper.max(p.cr_audited));
        let top = ratios.chain(prefixes.iter().map(|(p, _)| p.cr_audited)).fold(1.0, f64::max);
        let (name, axis) = match self.dial {
            "tau" => ("threshold", "threshold tau on similarity"),
            "max-error" => {
                ("error budget", "largest relative squared error of a block's keys and of its values")
            }
            other => (other, other),
        };
        // Dials are of any size: steps are thousandths. A single point needs room too.
        let spare = if high > low { 0.05 * (high - low) } else { 0.05 * high.abs().max(0.02) };
        // Where no line is: ratios that rise with their dial lie high above what the paper counts.
        let rises = |s: &[Point]| match s {
            [first, .., last] => (at(last) - at(first)) * (last.cr_audited - first.cr_audited) > 0.0,
            _ => false,
        };
        let legend_at = match self.dial {
            "max-error" => SeriesLabelPosition::UpperLeft,
            _ if self.series().any(rises) => SeriesLabelPosition::MiddleRight,
            _ => SeriesLabelPosition::UpperRight,
        };
        let title = format!("Compression ratio against {name} ({})", t.title);
        let mut chart = ChartBuilder::on(root)
            .caption(&title, fitting(root, &title, 20))
            .margin(12)
            .x_label_area_size(52)
            .y_label_area_size(70)
            .build_cartesian_2d(low - spare..high + spare, (0.9..top * 1.6).log_scale())
            .map_err(said)?;
        axes(&mut chart, axis, "compression ratio (log axis)")?;
        for (n, (prefix, series)) in prefixes.into_iter().enumerate() {
            let color = series.map_or(GREY, series_color);
            let cr = prefix.cr_audited;
            let line =
                DashedLineSeries::new([(low - spare, cr), (high + spare, cr)], 6, 4, color.stroke_width(2));
            let drawn = chart.draw_series(line).map_err(said)?;
            if n == 0 {
                drawn
                    .label(prefix_label(t, "audited"))
                    .legend(|(x, y)| PathElement::new([(x, y), (x + 22, y)], GREY.stroke_width(2)));
            }
        }
        // The paper's count first, so that the audited lines lie on top.
        for (n, series) in self.series().enumerate() {
            let color = series_color(n).mix(0.35);
            let line = series.iter().map(|p| (at(p), p.cr_paper));
            let drawn =
                chart.draw_series(LineSeries::new(line.clone(), color.stroke_width(3))).map_err(said)?;
            if n == 0 {
                drawn
                    .label("pale: as the paper counts (full blocks of fused layers)")
                    .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], color.stroke_width(3)));
            }
            chart.draw_series(line.map(|at| Circle::new(at, 4, color.filled()))).map_err(said)?;
        }
        for (n, series) in self.series().enumerate() {
            let color = series_color(n);
            let line = series.iter().map(|p| (at(p), p.cr_audited));
            chart
                .draw_series(LineSeries::new(line.clone(), color.stroke_width(3)))
                .map_err(said)?
                .label(format!("{}, audited", series[0].label))
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], color.stroke_width(3)));
            chart.draw_series(line.map(|at| Circle::new(at, 4, color.filled()))).map_err(said)?;
        }
        legend(&mut chart, legend_at)
    }
}
