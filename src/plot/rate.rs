//! Compression ratio against the threshold: the paper's figure beside the audited one.

use super::canvas::{Area, Drawn, FONT, Figure, axes, legend, said, series_color};
use super::series::{Point, SweepTable, series_name};
use plotters::prelude::*;

/// What the ratio is drawn against.
#[derive(Clone, Copy, PartialEq)]
pub enum Against {
    Tau,
    MaxError,
}

impl Against {
    fn of(self, p: &Point) -> f64 {
        match self {
            Against::Tau => p.tau,
            Against::MaxError => p.max_error,
        }
    }
}

/// A table's fusing series that have such a rule.
pub struct Rate<'a> {
    pub table: &'a SweepTable,
    pub against: Against,
}

impl Rate<'_> {
    fn series(&self) -> impl Iterator<Item = &[Point]> {
        self.table.fusion.iter().map(Vec::as_slice).filter(|s| self.against.of(&s[0]).is_finite())
    }

    /// Whether there is anything to draw.
    pub fn is_empty(&self) -> bool {
        self.series().next().is_none()
    }
}

impl Figure for Rate<'_> {
    fn size(&self) -> (u32, u32) {
        (900, 560)
    }

    fn draw<DB: DrawingBackend>(&self, root: &Area<DB>) -> Drawn {
        let t = self.table;
        let at = |p: &Point| self.against.of(p);
        let points: Vec<&Point> = self.series().flatten().collect();
        let low = points.iter().map(|p| at(p)).fold(f64::INFINITY, f64::min);
        let high = points.iter().map(|p| at(p)).fold(f64::NEG_INFINITY, f64::max);
        let top = points.iter().map(|p| p.cr_paper.max(p.cr_audited)).fold(t.prefix.cr_audited, f64::max);
        let (name, axis, legend_at) = match self.against {
            Against::Tau => ("threshold", "threshold tau on similarity", SeriesLabelPosition::UpperRight),
            Against::MaxError => (
                "error budget",
                "largest relative squared error of a block's keys and of its values",
                SeriesLabelPosition::UpperLeft,
            ),
        };
        let mut chart = ChartBuilder::on(root)
            .caption(format!("Compression ratio against {name} ({})", t.title), (FONT, 20))
            .margin(12)
            .x_label_area_size(52)
            .y_label_area_size(70)
            .build_cartesian_2d(low - 0.02..high + 0.02, (0.9..top * 1.6).log_scale())
            .map_err(said)?;
        axes(&mut chart, axis, "compression ratio (log axis)")?;
        let grey = RGBColor(110, 110, 110);
        let prefix = [(low - 0.02, t.prefix.cr_audited), (high + 0.02, t.prefix.cr_audited)];
        chart
            .draw_series(DashedLineSeries::new(prefix, 6, 4, grey.stroke_width(2)))
            .map_err(said)?
            .label(format!("exact prefix sharing, audited ({:.2})", t.prefix.cr_audited))
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], grey.stroke_width(2)));
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
                .label(format!("{}, audited", series_name(&series[0])))
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], color.stroke_width(3)));
            chart.draw_series(line.map(|at| Circle::new(at, 4, color.filled()))).map_err(said)?;
        }
        legend(&mut chart, legend_at)
    }
}
