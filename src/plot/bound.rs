//! What a codec spends against the Gaussian bound of its predictors, by layer.

use super::canvas::{Area, Drawn, Figure, axes, fitting, legend, said, series_color};
use crate::error::Result;
use crate::sweep::boundary;
use crate::tables::Table;
use plotters::prelude::*;
use polars::prelude::{col, lit};
use serde::Deserialize;

/// Bits of one chain, by layer: coded and Gaussian.
struct Curve {
    coded: Vec<(f64, f64)>,
    gaussian: Vec<(f64, f64)>,
}

pub struct Bounds {
    methods: Vec<String>,
    /// Keys and values, chain by chain.
    kinds: [Vec<Curve>; 2],
}

impl Bounds {
    pub fn new(layers: &Table) -> Result<Self> {
        #[derive(Deserialize)]
        struct Layer {
            layer: f64,
            coded_bits_per_element: f64,
            gaussian_bits_per_element: f64,
        }
        let curve = |rows: Vec<Layer>| {
            let both =
                |l: &Layer| ((l.layer, l.coded_bits_per_element), (l.layer, l.gaussian_bits_per_element));
            let (coded, gaussian) = rows.iter().map(both).unzip();
            Curve { coded, gaussian }
        };
        let chains = layers.groups("method")?;
        let curves = |kind: &str| -> Result<Vec<Curve>> {
            let of_kind = |chain: &Table| chain.query(|rows| rows.filter(col("kind").eq(lit(kind))))?.rows();
            chains.iter().map(|(_, chain)| Ok(curve(of_kind(chain)?))).collect()
        };
        let kinds = [curves("keys")?, curves("values")?];
        Ok(Bounds { kinds, methods: chains.into_iter().map(|(method, _)| method).collect() })
    }

    /// Chains without what all begin with, up to an option.
    fn names(&self) -> Vec<String> {
        let first = &self.methods[0];
        let agree = |m: &String| m.bytes().zip(first.bytes()).take_while(|(a, b)| a == b).count();
        let same = self.methods.iter().map(agree).min().unwrap_or(0);
        let cut = match self.methods.len() {
            0 | 1 => 0,
            _ => first[..boundary(first, same)].rfind([',', ':', '+']).map_or(0, |at| at + 1),
        };
        self.methods.iter().map(|m| m[cut..].to_owned()).collect()
    }
}

impl Figure for Bounds {
    fn size(&self) -> (u32, u32) {
        (1200, 480)
    }

    fn draw<DB: DrawingBackend>(&self, root: &Area<DB>) -> Drawn {
        let title =
            "Bits spent (solid) and the Gaussian bound of the same predictors at the same error (dashed)";
        let root = root.margin(8, 16, 0, 0).titled(title, fitting(root, title, 20)).map_err(said)?;
        let panels = root.split_evenly((1, 2));
        let points = self.kinds.iter().flatten().flat_map(|c| c.coded.iter().chain(&c.gaussian));
        let (mut last, mut top) = (1.0f64, 0.01f64);
        for (layer, bits) in points {
            (last, top) = (last.max(*layer), top.max(*bits));
        }
        let names = self.names();
        for (panel, (kind, curves)) in panels.iter().zip(["keys", "values"].into_iter().zip(&self.kinds)) {
            let mut chart = ChartBuilder::on(panel)
                .margin(12)
                .x_label_area_size(48)
                .y_label_area_size(66)
                .build_cartesian_2d(0.0..last, 0.0..top * 1.35)
                .map_err(said)?;
            axes(&mut chart, "layer", &format!("bits per coded number, {kind}"))?;
            for (n, curve) in curves.iter().enumerate() {
                let color = series_color(n);
                chart
                    .draw_series(LineSeries::new(curve.coded.iter().copied(), color.stroke_width(2)))
                    .map_err(said)?
                    .label(names[n].clone())
                    .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], color.stroke_width(3)));
                let line = curve.gaussian.iter().copied();
                chart.draw_series(DashedLineSeries::new(line, 5, 4, color.stroke_width(2))).map_err(said)?;
            }
            legend(&mut chart, SeriesLabelPosition::UpperRight)?;
        }
        Ok(())
    }
}
