//! Compression ratio against the threshold: the paper's figure beside the audited one.

use super::canvas::{Area, Drawn, FONT, Figure, axes, legend, said, series_color};
use super::series::{Point, SweepTable, series_name};
use plotters::prelude::*;

pub struct Rate<'a> {
    pub table: &'a SweepTable,
}

impl Figure for Rate<'_> {
    fn size(&self) -> (u32, u32) {
        (900, 560)
    }

    fn draw<DB: DrawingBackend>(&self, root: &Area<DB>) -> Drawn {
        let t = self.table;
        let points: Vec<&Point> = t.fusion.iter().flatten().collect();
        let low = points.iter().map(|p| p.tau).fold(f64::INFINITY, f64::min);
        let high = points.iter().map(|p| p.tau).fold(f64::NEG_INFINITY, f64::max);
        let top = points.iter().map(|p| p.cr_paper.max(p.cr_audited)).fold(t.prefix.cr_audited, f64::max);
        let mut chart = ChartBuilder::on(root)
            .caption(format!("Compression ratio against threshold ({})", t.title), (FONT, 20))
            .margin(12)
            .x_label_area_size(52)
            .y_label_area_size(70)
            .build_cartesian_2d(low - 0.02..high + 0.02, (0.9..top * 1.3).log_scale())
            .map_err(said)?;
        axes(&mut chart, "threshold tau on similarity", "compression ratio (log axis)", true)?;
        let grey = RGBColor(110, 110, 110);
        let prefix = [(low - 0.02, t.prefix.cr_audited), (high + 0.02, t.prefix.cr_audited)];
        chart
            .draw_series(DashedLineSeries::new(prefix, 6, 4, grey.stroke_width(2)))
            .map_err(said)?
            .label(format!("exact prefix sharing, audited ({:.2})", t.prefix.cr_audited))
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], grey.stroke_width(2)));
        for (n, series) in t.fusion.iter().enumerate() {
            for (kind, cr, shade) in [
                (
                    "audited (whole cache, side information)",
                    (|p: &Point| p.cr_audited) as fn(&Point) -> f64,
                    1.0,
                ),
                ("as the paper counts", |p: &Point| p.cr_paper, 0.4),
            ] {
                let color = series_color(n).mix(shade);
                let line = series.iter().map(|p| (p.tau, cr(p)));
                chart
                    .draw_series(LineSeries::new(line.clone(), color.stroke_width(3)))
                    .map_err(said)?
                    .label(format!("{}, {kind}", series_name(series)))
                    .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], color.stroke_width(3)));
                chart.draw_series(line.map(|at| Circle::new(at, 4, color.filled()))).map_err(said)?;
            }
        }
        legend(&mut chart, SeriesLabelPosition::UpperRight)
    }
}
