//! What the model says of batch sizes that nobody can run here.

use super::canvas::{Area, Drawn, FONT, Figure, axes, fitting, legend, said, series_color};
use crate::error::Result;
use crate::tables::Table;
use plotters::prelude::*;
use serde::Deserialize;

#[derive(Deserialize)]
struct Point {
    model: String,
    pairing: String,
    tau: f64,
    requests: f64,
    cr: f64,
    #[serde(rename = "cr_duplicates")]
    duplicates: f64,
    percolated: f64,
}

pub struct Scale {
    points: Vec<Point>,
}

/// Thresholds worth a line, where the table has them.
const TAUS: [f64; 5] = [0.95, 0.9, 0.85, 0.8, 0.75];

impl Scale {
    pub fn new(rows: &Table) -> Result<Self> {
        Ok(Scale { points: rows.rows()? })
    }
}

impl Figure for Scale {
    fn size(&self) -> (u32, u32) {
        (1200, 540)
    }

    fn draw<DB: DrawingBackend>(&self, root: &Area<DB>) -> Drawn {
        let title = "Extrapolated ratio (model by position, all layers); ring: from here on some layer has a giant component";
        let root = root.margin(8, 8, 0, 8).titled(title, fitting(root, title, 19)).map_err(said)?;
        let panels = root.split_evenly((1, 2));
        let own = |p: &&Point| p.model == "by_position" && p.pairing != "components";
        let all: Vec<&Point> = self.points.iter().filter(own).collect();
        let mut taus: Vec<f64> = all.iter().map(|p| p.tau).collect();
        taus.sort_by(|a, b| b.total_cmp(a));
        taus.dedup();
        let known: Vec<f64> = TAUS.into_iter().filter(|t| taus.contains(t)).collect();
        let taus = if known.is_empty() { taus.into_iter().take(5).collect() } else { known };
        let shown = |p: &&&Point| taus.contains(&p.tau);
        let top = all.iter().filter(shown).map(|p| p.cr).fold(4.0, f64::max);
        let (first, last) =
            all.iter().fold((f64::INFINITY, 1.0f64), |(a, b), p| (a.min(p.requests), b.max(p.requests)));
        for (pairing, panel) in ["tree", "best"].into_iter().zip(&panels) {
            let mut chart = ChartBuilder::on(panel)
                .caption(pairing, (FONT, 16))
                .margin(8)
                .x_label_area_size(46)
                .y_label_area_size(70)
                .build_cartesian_2d((first * 0.9..last * 1.1).log_scale(), (0.9..top * 3.0).log_scale())
                .map_err(said)?;
            axes(&mut chart, "requests in the batch (log)", "full blocks before / after (log)")?;
            let grey = RGBColor(110, 110, 110);
            let duplicates: Vec<(f64, f64)> = all
                .iter()
                .filter(|p| p.pairing == pairing && p.tau == taus[0])
                .map(|p| (p.requests, p.duplicates))
                .collect();
            chart
                .draw_series(DashedLineSeries::new(duplicates, 6, 4, grey.stroke_width(2)))
                .map_err(said)?
                .label("exact duplicates alone")
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], grey.stroke_width(2)));
            for (n, &tau) in taus.iter().enumerate() {
                let color = series_color(n);
                let line: Vec<&&Point> =
                    all.iter().filter(|p| p.pairing == pairing && p.tau == tau).collect();
                chart
                    .draw_series(LineSeries::new(
                        line.iter().map(|p| (p.requests, p.cr)),
                        color.stroke_width(2),
                    ))
                    .map_err(said)?
                    .label(format!("tau {tau}"))
                    .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], color.stroke_width(3)));
                if let Some(p) = line.iter().find(|p| p.percolated > 0.0) {
                    let ring = Circle::new((p.requests, p.cr), 7, BLACK.stroke_width(2));
                    chart.draw_series([ring]).map_err(said)?;
                }
            }
            if pairing == "tree" {
                legend(&mut chart, SeriesLabelPosition::UpperLeft)?;
            }
        }
        Ok(())
    }
}
