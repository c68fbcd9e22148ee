//! Audited compression ratio of every layer at every threshold.

use super::canvas::{Area, Drawn, FONT, Figure, fitting, said};
use super::series::{Point, SweepTable};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Of the first fusion series of the table.
pub struct LayerMap<'a> {
    pub table: &'a SweepTable,
}

/// Pixels of a cell's height; small enough for a README, large enough for its number.
const CELL_HEIGHT: u32 = 18;

impl Figure for LayerMap<'_> {
    fn size(&self) -> (u32, u32) {
        let layers = self.series()[0].layer_cr.len() as u32;
        (900, 130 + CELL_HEIGHT * layers)
    }

    fn draw<DB: DrawingBackend>(&self, root: &Area<DB>) -> Drawn {
        let series = self.series();
        let layers = series[0].layer_cr.len();
        let top = series.iter().flat_map(|p| &p.layer_cr).copied().fold(1.0, f64::max);
        let title = format!("Audited compression ratio by layer: {} ({})", series[0].label, self.table.title);
        let mut chart = ChartBuilder::on(root)
            .caption(&title, fitting(root, &title, 18))
            .margin(12)
            .x_label_area_size(52)
            .y_label_area_size(60)
            .build_cartesian_2d(0..series.len(), (0..layers - 1).into_segmented())
            .map_err(said)?;
        let tau = |i: &usize| series.get(*i).map_or(String::new(), |p| p.name.clone());
        chart
            .configure_mesh()
            .disable_mesh()
            .x_labels(series.len() + 1)
            .x_label_formatter(&|_| String::new())
            .y_labels(layers)
            .y_label_formatter(&|y| match y {
                SegmentValue::CenterOf(layer) => layer.to_string(),
                _ => String::new(),
            })
            .x_desc("threshold tau, error budget or thresholds file (number in a cell: ratio; grey: nothing saved)")
            .y_desc("layer")
            .label_style((FONT, 13))
            .axis_desc_style((FONT, 15))
            .draw()
            .map_err(said)?;
        for (i, point) in series.iter().enumerate() {
            for (layer, &cr) in point.layer_cr.iter().enumerate() {
                let share = if top > 1.0 { (cr.max(1.0).ln() / top.ln()).clamp(0.0, 1.0) } else { 0.0 };
                let color = if cr <= 1.0 { RGBColor(225, 225, 225) } else { shade(share) };
                let corners = [
                    (i, SegmentValue::Exact(layer)),
                    (
                        i + 1,
                        if layer + 1 < layers { SegmentValue::Exact(layer + 1) } else { SegmentValue::Last },
                    ),
                ];
                chart.draw_series([Rectangle::new(corners, color.filled())]).map_err(said)?;
            }
        }
        // Numbers in pixels: the middle of a cell lies between two of the chart's integer coordinates.
        let area = chart.plotting_area();
        for (i, point) in series.iter().enumerate() {
            let (left, _) = area.map_coordinate(&(i, SegmentValue::Exact(0)));
            let (right, bottom) = area.map_coordinate(&(i + 1, SegmentValue::Exact(0)));
            let middle = (left + right) / 2;
            for (layer, &cr) in point.layer_cr.iter().enumerate() {
                let (_, y) = area.map_coordinate(&(i, SegmentValue::CenterOf(layer)));
                let dark = top > 1.0 && cr.max(1.0).ln() / top.ln() > 0.55;
                let color = if dark { WHITE } else { BLACK };
                let text = if cr < 10.0 { format!("{cr:.2}") } else { format!("{cr:.1}") };
                let style = (FONT, 12).into_font().color(&color).pos(Pos::new(HPos::Center, VPos::Center));
                root.draw(&Text::new(text, (middle, y), style)).map_err(said)?;
            }
            let style = (FONT, 14).into_font().color(&BLACK).pos(Pos::new(HPos::Center, VPos::Top));
            root.draw(&Text::new(tau(&i), (middle, bottom + 8), style)).map_err(said)?;
        }
        Ok(())
    }
}

impl LayerMap<'_> {
    fn series(&self) -> &[Point] {
        &self.table.fusion[0]
    }
}

/// From light yellow (0) to dark blue (1).
fn shade(share: f64) -> RGBColor {
    const STOPS: [(f64, [f64; 3]); 4] = [
        (0.0, [255.0, 250.0, 205.0]),
        (0.35, [127.0, 205.0, 187.0]),
        (0.7, [44.0, 127.0, 184.0]),
        (1.0, [20.0, 40.0, 110.0]),
    ];
    let next = STOPS.iter().position(|(at, _)| share <= *at).unwrap_or(STOPS.len() - 1).max(1);
    let ((from, a), (to, b)) = (STOPS[next - 1], STOPS[next]);
    let t = (share - from) / (to - from);
    let mixed = |i: usize| (a[i] + (b[i] - a[i]) * t).round() as u8;
    RGBColor(mixed(0), mixed(1), mixed(2))
}
