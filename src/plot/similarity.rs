//! How alike blocks are: densities by layer, exceedances with their fits, dispersion by layer.

use super::canvas::{Area, Drawn, FONT, Figure, axes, fitting, legend, said, series_color};
use crate::stats::StatRow;
use plotters::prelude::*;

/// One number of a layer: of keys or values, of one class of pairs.
fn values<'a>(
    rows: &'a [&'a StatRow],
    part: &'a str,
    class: &'a str,
    statistic: &'a str,
) -> impl Iterator<Item = &'a StatRow> + 'a {
    let wanted = move |r: &&&StatRow| r.part == part && r.class == class && r.statistic == statistic;
    rows.iter().filter(wanted).copied()
}

fn layers(rows: &[&StatRow]) -> usize {
    rows.iter().map(|r| r.layer + 1).max().unwrap_or(1)
}

const CLASSES: [(&str, &str); 3] = [
    ("same_request", "same request"),
    ("same_position", "other request, same position"),
    ("other", "other request, other position"),
];

/// Density of the cosine in every layer: keys and values, by class of pairs.
pub struct Densities<'a> {
    pub rows: &'a [&'a StatRow],
    pub size: usize,
}

impl Figure for Densities<'_> {
    fn size(&self) -> (u32, u32) {
        (1200, 820)
    }

    fn draw<DB: DrawingBackend>(&self, root: &Area<DB>) -> Drawn {
        let title = format!(
            "Cosine similarity of distinct blocks of {} tokens, by layer (density; darker is more)",
            self.size
        );
        let root = root.margin(8, 8, 0, 8).titled(&title, fitting(root, &title, 22)).map_err(said)?;
        let panels = root.split_evenly((2, CLASSES.len()));
        let layers = layers(self.rows);
        for (row, (part, part_words)) in [("key", "keys"), ("value", "values")].into_iter().enumerate() {
            for (column, (class, words)) in CLASSES.into_iter().enumerate() {
                let mut chart = ChartBuilder::on(&panels[row * CLASSES.len() + column])
                    .caption(format!("{part_words}, {words}"), (FONT, 16))
                    .margin(8)
                    .x_label_area_size(44)
                    .y_label_area_size(50)
                    .build_cartesian_2d(-0.5..1.0, 0.0..layers as f64)
                    .map_err(said)?;
                axes(&mut chart, "cosine", "layer")?;
                let cells = values(self.rows, part, class, "density").filter_map(|r| {
                    let at = r.at?;
                    // Equal steps of the eye: the square root of the density, 10 and more is the darkest.
                    let share = (r.value / 10.0).sqrt().min(1.0);
                    let left = at.max(-0.5) - 0.01;
                    let corners = [(left, r.layer as f64), (at + 0.01, r.layer as f64 + 1.0)];
                    (at > -0.5).then(|| Rectangle::new(corners, series_color(0).mix(share).filled()))
                });
                chart.draw_series(cells).map_err(said)?;
                let means = values(self.rows, part, class, "mean").map(|r| {
                    let x = r.value;
                    PathElement::new(
                        [(x, r.layer as f64), (x, r.layer as f64 + 1.0)],
                        series_color(1).stroke_width(3),
                    )
                });
                chart.draw_series(means).map_err(said)?.label("mean").legend(|(x, y)| {
                    PathElement::new([(x, y), (x + 22, y)], series_color(1).stroke_width(3))
                });
                if row + column == 0 {
                    legend(&mut chart, SeriesLabelPosition::LowerLeft)?;
                }
            }
        }
        Ok(())
    }
}

/// Share of pairs above a threshold: measured, Gaussian, Pareto; of the keys of some layers.
pub struct Exceedances<'a> {
    pub rows: &'a [&'a StatRow],
    pub size: usize,
}

/// Shares below this are not drawn.
const FLOOR: f64 = 1e-7;

impl Figure for Exceedances<'_> {
    fn size(&self) -> (u32, u32) {
        (1200, 820)
    }

    fn draw<DB: DrawingBackend>(&self, root: &Area<DB>) -> Drawn {
        let title = format!(
            "Share of pairs above a threshold, keys, blocks of {} tokens (points: measured, 95 % over requests)",
            self.size
        );
        let root = root.margin(8, 8, 0, 8).titled(&title, fitting(root, &title, 22)).map_err(said)?;
        let panels = root.split_evenly((2, 3));
        let layers = layers(self.rows);
        for (i, panel) in panels.iter().enumerate().take(layers) {
            let layer = if layers <= 6 { i } else { i * (layers - 1) / 5 };
            self.panel(panel, layer, i == 0)?;
        }
        Ok(())
    }
}

impl Exceedances<'_> {
    fn panel<DB: DrawingBackend>(&self, panel: &Area<DB>, layer: usize, first: bool) -> Drawn {
        let own: Vec<&StatRow> = self.rows.iter().filter(|r| r.layer == layer).copied().collect();
        let mut chart = ChartBuilder::on(panel)
            .caption(format!("layer {layer}"), (FONT, 16))
            .margin(8)
            .x_label_area_size(44)
            .y_label_area_size(76)
            .build_cartesian_2d(0.28..1.0, (FLOOR..2.0).log_scale())
            .map_err(said)?;
        axes(&mut chart, "threshold tau", "P(cosine > tau)")?;
        let line = |class: &str, statistic: &str| -> Vec<(f64, f64)> {
            let points = values(&own, "key", class, statistic).filter_map(|r| Some((r.at?, r.value)));
            let mut points: Vec<(f64, f64)> = points.filter(|p| p.1 >= FLOOR).collect();
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            points
        };
        for (n, (class, words)) in [CLASSES[1], CLASSES[2]].into_iter().enumerate() {
            let color = series_color(n);
            let marks =
                values(&own, "key", class, "exceedance").filter(|r| r.value >= FLOOR).filter_map(|r| {
                    let (low, high) = (r.low.unwrap_or(r.value), r.high.unwrap_or(r.value));
                    let bar = ErrorBar::new_vertical(
                        r.at?,
                        low.max(FLOOR),
                        r.value,
                        high.max(FLOOR),
                        color.filled(),
                        7,
                    );
                    Some(bar)
                });
            chart
                .draw_series(marks)
                .map_err(said)?
                .label(words)
                .legend(move |(x, y)| Circle::new((x + 11, y), 4, color.filled()));
            let gaussian = line(class, "gaussian_exceedance");
            chart.draw_series(DashedLineSeries::new(gaussian, 4, 4, color.stroke_width(1))).map_err(said)?;
            let pareto = line(class, "pareto_exceedance");
            chart.draw_series(LineSeries::new(pareto, color.stroke_width(3))).map_err(said)?;
        }
        if first {
            // What the lines are, in grey: both classes have both.
            let grey = RGBColor(110, 110, 110);
            let nothing = || std::iter::empty::<(f64, f64)>();
            chart
                .draw_series(LineSeries::new(nothing(), grey.stroke_width(1)))
                .map_err(said)?
                .label("dashed: Gaussian body")
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 8, y)], grey.stroke_width(1)));
            chart
                .draw_series(LineSeries::new(nothing(), grey.stroke_width(3)))
                .map_err(said)?
                .label("thick: Pareto tail")
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], grey.stroke_width(3)));
            legend(&mut chart, SeriesLabelPosition::LowerLeft)?;
        }
        Ok(())
    }
}

/// Points of a curve.
type Line = Vec<(f64, f64)>;

/// Dispersion index, and how much likelier a pair is above the threshold if a neighbour is, by layer.
pub struct Dispersions<'a> {
    pub rows: &'a [&'a StatRow],
    pub size: usize,
}

impl Figure for Dispersions<'_> {
    fn size(&self) -> (u32, u32) {
        (1200, 520)
    }

    fn draw<DB: DrawingBackend>(&self, root: &Area<DB>) -> Drawn {
        let title = format!(
            "Do exceedances come alone? Keys, all pairs, blocks of {} tokens (1: as the Poisson model has it)",
            self.size
        );
        let root = root.margin(8, 8, 0, 8).titled(&title, fitting(root, &title, 22)).map_err(said)?;
        let panels = root.split_evenly((1, 2));
        let layers = layers(self.rows) as f64;
        let at = |statistic: &'static str, tau: f64| {
            values(self.rows, "key", "all", statistic).filter(move |r| r.at == Some(tau))
        };
        let mut taus: Vec<f64> = values(self.rows, "key", "all", "dispersion").filter_map(|r| r.at).collect();
        taus.sort_by(|a, b| b.total_cmp(a));
        taus.dedup();
        let shown: Vec<f64> = [0.95, 0.9, 0.85, 0.8, 0.7].into_iter().filter(|t| taus.contains(t)).collect();
        let shown = if shown.is_empty() { taus.into_iter().take(5).collect() } else { shown };
        let ratio = |tau: f64| -> Line {
            let q: Vec<(usize, f64)> = at("exceedance", tau).map(|r| (r.layer, r.value)).collect();
            at("rho1", tau)
                .filter_map(|r| {
                    let q = q.iter().find(|(layer, _)| *layer == r.layer)?.1;
                    (q > 0.0).then(|| (r.layer as f64, r.value / q))
                })
                .collect()
        };
        let dispersion = |tau: f64| -> Vec<(f64, f64)> {
            at("dispersion", tau).map(|r| (r.layer as f64, r.value)).collect()
        };
        let charts: [(&Area<DB>, &str, Vec<Line>); 2] = [
            (
                &panels[0],
                "variance / mean of a block's exceedances",
                shown.iter().map(|&t| dispersion(t)).collect(),
            ),
            (&panels[1], "rho1 / q", shown.iter().map(|&t| ratio(t)).collect()),
        ];
        for (panel, words, lines) in charts {
            let all = || lines.iter().flatten().map(|p| p.1).filter(|y| *y > 0.0);
            let (low, high) = (all().fold(0.7, f64::min), all().fold(2.0, f64::max));
            let mut chart = ChartBuilder::on(panel)
                .margin(8)
                .x_label_area_size(48)
                .y_label_area_size(72)
                .build_cartesian_2d(-0.5..layers - 0.5, (low * 0.8..high * 4.0).log_scale())
                .map_err(said)?;
            axes(&mut chart, "layer", words)?;
            let grey = RGBColor(110, 110, 110).stroke_width(2);
            let ends = [(-0.5, 1.0), (layers - 0.5, 1.0)];
            chart.draw_series(DashedLineSeries::new(ends, 6, 4, grey)).map_err(said)?;
            for (n, (tau, line)) in shown.iter().zip(lines).enumerate() {
                let color = series_color(n);
                let points: Vec<(f64, f64)> = line.into_iter().filter(|p| p.1 > 0.0).collect();
                chart
                    .draw_series(LineSeries::new(points.clone(), color.stroke_width(2)))
                    .map_err(said)?
                    .label(format!("tau {tau}"))
                    .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], color.stroke_width(3)));
                chart
                    .draw_series(points.into_iter().map(|p| Circle::new(p, 3, color.filled())))
                    .map_err(said)?;
            }
            legend(&mut chart, SeriesLabelPosition::UpperRight)?;
        }
        Ok(())
    }
}
