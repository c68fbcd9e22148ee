//! Synthetic worlds: the sweep's own code against the closed forms.

use super::canvas::{Area, Drawn, FONT, Figure, axes, fitting, legend, said, series_color};
use crate::error::Result;
use crate::tables::Table;
use plotters::prelude::*;
use serde::Deserialize;

#[derive(Deserialize)]
struct Point {
    world: String,
    pairing: String,
    tau: f64,
    cr: f64,
    #[serde(rename = "cr_low")]
    low: f64,
    #[serde(rename = "cr_high")]
    high: f64,
    #[serde(rename = "cr_model")]
    model: f64,
}

pub struct Worlds {
    points: Vec<Point>,
    title: String,
}

const PAIRINGS: [&str; 4] = ["tree", "best", "components", "lsh"];

fn words(world: &str) -> &str {
    match world {
        "iid" => "independent directions (the model's world)",
        "common" => "the same, plus a common component",
        "law" => "the layer's measured similarities, by class",
        other => other,
    }
}

impl Worlds {
    pub fn new(rows: &Table) -> Result<Self> {
        let (requests, blocks, layer) =
            (rows.floats("requests")?, rows.floats("blocks")?, rows.floats("layer")?);
        let title = format!(
            "Synthetic caches like layer {}: {} requests of {} blocks, fused by the sweep's code (points) and in closed form (lines)",
            layer[0], requests[0], blocks[0]
        );
        Ok(Worlds { points: rows.rows()?, title })
    }
}

impl Figure for Worlds {
    fn size(&self) -> (u32, u32) {
        (1200, 520)
    }

    fn draw<DB: DrawingBackend>(&self, root: &Area<DB>) -> Drawn {
        let root =
            root.margin(8, 8, 0, 8).titled(&self.title, fitting(root, &self.title, 18)).map_err(said)?;
        let mut worlds: Vec<&str> = self.points.iter().map(|p| &p.world[..]).collect();
        worlds.dedup();
        let panels = root.split_evenly((1, worlds.len()));
        // Below the thresholds at which anything is left to see there is one block left.
        let seen = |p: &&Point| p.cr > 1.0005 && p.tau >= 0.5;
        let low = self.points.iter().filter(seen).map(|p| p.tau).fold(0.9, f64::min);
        let top = self.points.iter().map(|p| p.cr.max(p.model)).fold(2.0, f64::max);
        for (i, (world, panel)) in worlds.into_iter().zip(&panels).enumerate() {
            let mut chart = ChartBuilder::on(panel)
                .caption(words(world), (FONT, 15))
                .margin(8)
                .x_label_area_size(46)
                .y_label_area_size(64)
                .build_cartesian_2d(low - 0.01..1.0, (0.9..top * 1.5).log_scale())
                .map_err(said)?;
            axes(&mut chart, "threshold tau (as in the common world)", "full blocks before / after (log)")?;
            for (n, pairing) in PAIRINGS.into_iter().enumerate() {
                let color = series_color(n);
                let own: Vec<&Point> = self
                    .points
                    .iter()
                    .filter(|p| p.world == world && p.pairing == pairing && p.tau >= low - 0.005)
                    .collect();
                if pairing != "lsh" {
                    let line = own.iter().map(|p| (p.tau, p.model));
                    chart.draw_series(LineSeries::new(line, color.stroke_width(2))).map_err(said)?;
                }
                let bars = own.iter().map(|p| {
                    ErrorBar::new_vertical(p.tau, p.low.max(0.9), p.cr, p.high.max(0.9), color.filled(), 6)
                });
                chart
                    .draw_series(bars)
                    .map_err(said)?
                    .label(if pairing == "lsh" { "lsh (no closed form)" } else { pairing })
                    .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], color.stroke_width(3)));
            }
            if i == 0 {
                legend(&mut chart, SeriesLabelPosition::UpperRight)?;
            }
        }
        Ok(())
    }
}
