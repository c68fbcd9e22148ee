//! KL by the place of a token in what is generated.

use super::canvas::{Area, Drawn, FONT, Figure, axes, fitting, said, series_color};
use crate::error::Result;
use crate::sweep::named;
use crate::tables::Table;
use plotters::prelude::*;
use serde::Deserialize;

/// The log axis ends here at the latest.
const KL_FLOOR: f64 = 1e-5;

/// Pixels of a line of names.
const LINE: i32 = 16;

/// One band of places, KL with its interval.
#[derive(Deserialize)]
struct Band {
    first: f64,
    last: f64,
    kl: f64,
    #[serde(rename = "kl_low")]
    low: f64,
    #[serde(rename = "kl_high")]
    high: f64,
}

impl Band {
    /// Its middle.
    fn at(&self) -> f64 {
        (self.first * self.last).sqrt()
    }
}

/// Arms of a positions.csv that lose something.
pub struct Positions {
    arms: Vec<(String, Vec<Band>)>,
    /// The last place there is.
    last: f64,
}

impl Positions {
    pub fn new(table: &Table) -> Result<Self> {
        let mut arms = Vec::new();
        for (_, arm) in named(table)?.groups("run")? {
            let name = format!("{} {}", arm.strings("series")?[0], arm.strings("point")?[0]);
            arms.push((name, arm.rows()?));
        }
        let last = table.floats("last")?.into_iter().fold(1.0, f64::max);
        arms.retain(|(_, bands): &(String, Vec<Band>)| bands.iter().any(|b| b.kl > KL_FLOOR));
        Ok(Positions { arms, last })
    }

    /// Arms to be drawn, and the last place there is.
    pub fn extent(&self) -> (usize, f64) {
        (self.arms.len(), self.last)
    }
}

impl Figure for Positions {
    fn size(&self) -> (u32, u32) {
        (900, 560)
    }

    fn draw<DB: DrawingBackend>(&self, root: &Area<DB>) -> Drawn {
        let all = || self.arms.iter().flat_map(|(_, bands)| bands);
        let floor = all().map(|b| b.kl).filter(|kl| *kl > 0.0).fold(1.0, f64::min).max(KL_FLOOR) / 2.0;
        let top = all().map(|b| b.high).fold(floor * 10.0, f64::max) * 1.5;
        let title = "KL by the place of a token after the prompt, teacher-forced";
        // Room for names behind the last band.
        let mut chart = ChartBuilder::on(root)
            .caption(title, fitting(root, title, 20))
            .margin(12)
            .x_label_area_size(58)
            .y_label_area_size(76)
            .build_cartesian_2d((0.9..self.last * 4.0).log_scale(), (floor..top).log_scale())
            .map_err(said)?;
        axes(
            &mut chart,
            "token after the prompt (log; bands that double)",
            "KL from no encoding, nats per token (log)",
        )?;
        let clip = |y: f64| y.clamp(floor, top);
        for (n, (_, bands)) in self.arms.iter().enumerate() {
            let color = series_color(n);
            let line = bands.iter().map(|b| (b.at(), clip(b.kl)));
            chart.draw_series(LineSeries::new(line.clone(), color.stroke_width(2))).map_err(said)?;
            let bars = bands.iter().map(|b| {
                ErrorBar::new_vertical(
                    b.at(),
                    clip(b.low),
                    clip(b.kl),
                    clip(b.high),
                    color.mix(0.4).filled(),
                    6,
                )
            });
            chart.draw_series(bars).map_err(said)?;
            chart.draw_series(line.map(|at| Circle::new(at, 4, color.filled()))).map_err(said)?;
        }
        // Names behind the ends, in the order of these, none over another.
        let area = chart.plotting_area();
        let ends = self.arms.iter().enumerate().filter_map(|(n, (name, bands))| {
            let end = bands.last().map(|b| (b.at(), clip(b.kl)))?;
            Some((area.map_coordinate(&end).1, n, name, end))
        });
        let mut ends: Vec<_> = ends.collect();
        ends.sort_by_key(|(y, n, ..)| (*y, *n));
        let frame = area.get_pixel_range().1;
        let mut tops: Vec<i32> = Vec::new();
        for (y, ..) in &ends {
            tops.push((y - LINE / 2).max(tops.last().map_or(frame.start, |before| before + LINE)));
        }
        // Those that were pushed below the axis push back.
        let mut floor = frame.end - LINE;
        for top in tops.iter_mut().rev() {
            *top = (*top).min(floor);
            floor = *top - LINE;
        }
        for ((y, n, name, end), top) in ends.into_iter().zip(tops) {
            let label =
                Text::new(name.clone(), (14, top - y), (FONT, 14).into_font().color(&series_color(n)));
            area.draw(&(EmptyElement::at(end) + label)).map_err(said)?;
        }
        Ok(())
    }
}
