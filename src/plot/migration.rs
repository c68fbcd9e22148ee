//! Seconds to move a request's cache against the rate of the link.

use super::canvas::{Area, Drawn, Figure, axes, fitting, legend, said, series_color};
use super::series::GREY;
use super::serving::by_chain;
use crate::error::Result;
use crate::tables::Table;
use plotters::prelude::*;

pub struct Migration {
    /// Seconds on each link, chain by chain.
    chains: Vec<(String, Vec<(f64, f64)>)>,
    recompute_seconds: f64,
}

impl Migration {
    /// From migration.csv.
    pub fn new(rows: &Table) -> Result<Self> {
        let points = |(name, chain): (String, Table)| {
            Ok((name, chain.floats("link_gbits")?.into_iter().zip(chain.floats("total_seconds")?).collect()))
        };
        Ok(Migration {
            chains: by_chain(rows)?.into_iter().map(points).collect::<Result<_>>()?,
            recompute_seconds: rows.floats("recompute_seconds")?[0],
        })
    }
}

impl Figure for Migration {
    fn size(&self) -> (u32, u32) {
        (900, 520)
    }

    fn draw<DB: DrawingBackend>(&self, root: &Area<DB>) -> Drawn {
        let points = || self.chains.iter().flat_map(|(_, points)| points).copied();
        let first = points().map(|p| p.0).fold(f64::INFINITY, f64::min) / 1.2;
        let last = points().map(|p| p.0).fold(0.0, f64::max) * 1.2;
        let seconds = || points().map(|p| p.1).chain([self.recompute_seconds]).filter(|s| *s > 0.0);
        let (least, most) = (seconds().fold(f64::INFINITY, f64::min), seconds().fold(0.0, f64::max));
        let title = "Seconds to move a request's cache: encode, send, decode (the link is a projection)";
        // Room for the legend above the curves.
        let y = (least / 2.0..most * (most / least).max(4.0).powf(0.5)).log_scale();
        let mut chart = ChartBuilder::on(root)
            .caption(title, fitting(root, title, 20))
            .margin(12)
            .x_label_area_size(58)
            .y_label_area_size(76)
            .build_cartesian_2d((first..last).log_scale(), y)
            .map_err(said)?;
        axes(&mut chart, "rate of the link, Gbit/s (log)", "seconds a request (log)")?;
        let line = [(first, self.recompute_seconds), (last, self.recompute_seconds)];
        chart
            .draw_series(DashedLineSeries::new(line, 6, 4, GREY.stroke_width(2)))
            .map_err(said)?
            .label("computed again on this machine")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 22, y)], GREY.stroke_width(2)));
        for (n, (name, points)) in self.chains.iter().enumerate() {
            let color = series_color(n);
            chart
                .draw_series(LineSeries::new(points.iter().copied(), color.stroke_width(2)))
                .map_err(said)?
                .label(name.clone())
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], color.stroke_width(3)));
            chart.draw_series(points.iter().map(|at| Circle::new(*at, 4, color.filled()))).map_err(said)?;
        }
        legend(&mut chart, SeriesLabelPosition::UpperRight)
    }
}
