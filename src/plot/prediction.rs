//! Predicted against measured: the ratio of every layer, and the error against the threshold.

use super::canvas::{Area, Drawn, FONT, Figure, axes, fitting, legend, said, series_color};
use crate::error::Result;
use crate::tables::Table;
use plotters::prelude::*;
use serde::Deserialize;

/// One layer and threshold.
#[derive(Deserialize)]
struct Dot {
    model: String,
    pairing: String,
    #[serde(rename = "cr_predicted")]
    predicted: f64,
    #[serde(rename = "cr_measured")]
    measured: f64,
}

/// All layers of a pairing and threshold.
#[derive(Deserialize)]
struct Middle {
    model: String,
    pairing: String,
    tau: f64,
    #[serde(rename = "cr_over")]
    over: f64,
    #[serde(rename = "cr_over_low")]
    low: f64,
    #[serde(rename = "cr_over_high")]
    high: f64,
}

pub struct Predictions {
    dots: Vec<Dot>,
    middles: Vec<Middle>,
}

const MODELS: [(&str, &str); 2] =
    [("uniform", "one probability for all pairs (the paper's)"), ("by_position", "one a position (ours)")];
const PAIRINGS: [&str; 3] = ["tree", "best", "components"];
/// Ratios beyond these are drawn at the edge.
const OVER: (f64, f64) = (0.2, 60.0);

impl Predictions {
    pub fn new(rows: &Table, summary: &Table) -> Result<Self> {
        Ok(Predictions { dots: rows.rows()?, middles: summary.rows()? })
    }
}

impl Figure for Predictions {
    fn size(&self) -> (u32, u32) {
        (1200, 900)
    }

    fn draw<DB: DrawingBackend>(&self, root: &Area<DB>) -> Drawn {
        let title = "Compression ratio predicted from pair statistics alone, against the sweep's (full blocks of a layer)";
        let root = root.margin(8, 8, 0, 8).titled(title, fitting(root, title, 20)).map_err(said)?;
        let panels = root.split_evenly((2, 2));
        for (row, (model, words)) in MODELS.into_iter().enumerate() {
            self.scatter(&panels[2 * row], model, words, row == 0)?;
            self.error(&panels[2 * row + 1], model, words)?;
        }
        Ok(())
    }
}

impl Predictions {
    fn scatter<DB: DrawingBackend>(&self, panel: &Area<DB>, model: &str, words: &str, first: bool) -> Drawn {
        let most = self.dots.iter().map(|d| d.measured).fold(4.0, f64::max) * 1.5;
        let range = 2.0f64.min(self.dots.iter().map(|d| d.measured).fold(f64::INFINITY, f64::min))..most;
        let (low, high) = (range.start, range.end);
        let mut chart = ChartBuilder::on(panel)
            .caption(words, (FONT, 16))
            .margin(8)
            .x_label_area_size(46)
            .y_label_area_size(70)
            .build_cartesian_2d(range.clone().log_scale(), range.log_scale())
            .map_err(said)?;
        axes(&mut chart, "measured ratio (log)", "predicted ratio (log; beyond: at the edge)")?;
        let grey = RGBColor(110, 110, 110);
        let ends = [(low, low), (high, high)];
        chart.draw_series(DashedLineSeries::new(ends, 6, 4, grey.stroke_width(2))).map_err(said)?;
        for (n, pairing) in PAIRINGS.into_iter().enumerate() {
            let color = series_color(n);
            let own = self.dots.iter().filter(|d| d.model == model && d.pairing == pairing);
            let marks = own
                .map(|d| Circle::new((d.measured, d.predicted.clamp(low, high)), 3, color.mix(0.6).filled()));
            chart
                .draw_series(marks)
                .map_err(said)?
                .label(pairing)
                .legend(move |(x, y)| Circle::new((x + 11, y), 4, color.filled()));
        }
        if first { legend(&mut chart, SeriesLabelPosition::LowerRight) } else { Ok(()) }
    }

    fn error<DB: DrawingBackend>(&self, panel: &Area<DB>, model: &str, words: &str) -> Drawn {
        let taus: Vec<f64> = self.middles.iter().map(|m| m.tau).collect();
        let low = taus.iter().copied().fold(f64::INFINITY, f64::min);
        let high = taus.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let mut chart = ChartBuilder::on(panel)
            .caption(words, (FONT, 16))
            .margin(8)
            .x_label_area_size(46)
            .y_label_area_size(70)
            .build_cartesian_2d(low - 0.02..high + 0.02, (OVER.0..OVER.1).log_scale())
            .map_err(said)?;
        axes(&mut chart, "threshold tau", "predicted / measured (median, 10-90 % of layers)")?;
        let band = Rectangle::new(
            [(low - 0.02, 0.9), (high + 0.02, 1.1)],
            RGBColor(120, 120, 120).mix(0.25).filled(),
        );
        chart.draw_series([band]).map_err(said)?;
        let clip = |y: f64| y.clamp(OVER.0, OVER.1);
        for (n, pairing) in PAIRINGS.into_iter().enumerate() {
            let color = series_color(n);
            let own: Vec<&Middle> =
                self.middles.iter().filter(|m| m.model == model && m.pairing == pairing).collect();
            // Side by side, or intervals would hide each other.
            let x = |m: &Middle| m.tau + (n as f64 - 1.0) * 0.003;
            let line = own.iter().map(|m| (x(m), clip(m.over)));
            chart.draw_series(LineSeries::new(line, color.stroke_width(2))).map_err(said)?;
            let bars = own.iter().map(|m| {
                ErrorBar::new_vertical(x(m), clip(m.low), clip(m.over), clip(m.high), color.filled(), 6)
            });
            chart.draw_series(bars).map_err(said)?;
        }
        Ok(())
    }
}
