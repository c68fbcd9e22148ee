//! What serving took and did: a row an arm, and the pool over time.

use super::canvas::{Area, Drawn, FONT, Figure, axes, fitting, legend, said, series_color};
use crate::codec::registry::method;
use crate::error::Result;
use crate::tables::Table;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use polars::prelude::{col, lit};
use serde::Deserialize;
use std::collections::{HashMap, HashSet};

/// One quantity of all arms.
struct Quantity {
    name: &'static str,
    /// Least, median and most, in the order of the arms.
    values: Vec<[f64; 3]>,
}

/// Medians of arms side by side, a panel a quantity.
pub struct Arms {
    title: String,
    names: Vec<String>,
    quantities: Vec<Quantity>,
}

impl Arms {
    /// From serve_summary.csv: its first load under its first budget.
    pub fn new(rows: &Table) -> Result<Self> {
        let rows = first_of(rows, &["request_rate", "budget_bytes"])?;
        let (rate, budget) = (rows.strings("request_rate")?, rows.floats("budget_bytes")?);
        let quantity = |name: &'static str, columns: [&str; 3], factor: f64| -> Result<Quantity> {
            let [low, mid, high] = columns.map(|c| rows.floats(c));
            let (low, mid, high) = (low?, mid?, high?);
            let values = (0..low.len()).map(|i| [low[i], mid[i], high[i]].map(|x| x * factor)).collect();
            Ok(Quantity { name, values })
        };
        let one = |name, column: &str, factor| quantity(name, [column; 3], factor);
        Ok(Arms {
            title: match (rate[0].parse::<f64>(), budget[0] / 1e6) {
                (Ok(rate), mb) if rate.is_finite() => {
                    format!("Serving {rate} requests a second under {mb:.0} MB of keys and values")
                }
                (_, mb) => format!("Serving all requests at once under {mb:.0} MB of keys and values"),
            },
            names: chains(&rows)?,
            quantities: vec![
                quantity(
                    "tokens/s out (least, median, most)",
                    ["output_throughput_low", "output_throughput", "output_throughput_high"],
                    1.0,
                )?,
                one("P95 of time to first token, s", "p95_ttft_ms", 1e-3)?,
                one("requests at once, mean", "mean_concurrent_requests", 1.0)?,
                quantity("KL, nats/token [95 %]", ["kl_low", "kl", "kl_high"], 1.0)?,
            ],
        })
    }
}

/// The rows that are as the first one in some columns.
pub fn first_of(rows: &Table, columns: &[&str]) -> Result<Table> {
    let as_first = columns.iter().map(|c| col(*c).eq_missing(col(*c).first()));
    rows.query(|rows| rows.filter(as_first.fold(lit(true), |all, one| all.and(one))))
}

/// Rows chain by chain, by its short name, in the order in which chains first come.
pub fn by_chain(rows: &Table) -> Result<Vec<(String, Table)>> {
    rows.with("chain", chains(rows)?)?.groups("chain")
}

/// The rows' chains without the files that they name, unless these alone tell two chains apart.
fn chains(rows: &Table) -> Result<Vec<String>> {
    let methods = rows.strings("method")?;
    // A timeline has thousands of rows of a few chains.
    let mut short: HashMap<&str, String> = HashMap::new();
    for method in &methods {
        short.entry(method).or_insert_with(|| without_files(method));
    }
    let told_apart = short.values().collect::<HashSet<_>>().len() == short.len();
    Ok(if told_apart { methods.iter().map(|m| short[&m[..]].clone()).collect() } else { methods })
}

/// A chain without the options that name files.
fn without_files(chain: &str) -> String {
    let stage = |stage: &str| {
        let (name, options) = stage.split_once(':').unwrap_or((stage, ""));
        let files = method(name).map_or(Vec::new(), |m| m.files());
        let named = |option: &&str| option.split_once('=').is_some_and(|(o, _)| files.iter().any(|f| f == o));
        let options: Vec<&str> = options.split(',').filter(|o| !o.is_empty() && !named(o)).collect();
        if options.is_empty() { name.to_owned() } else { format!("{name}:{}", options.join(",")) }
    };
    chain.split('+').map(stage).collect::<Vec<_>>().join("+")
}

impl Figure for Arms {
    fn size(&self) -> (u32, u32) {
        (1200, 120 + 44 * self.names.len() as u32)
    }

    fn draw<DB: DrawingBackend>(&self, root: &Area<DB>) -> Drawn {
        let title = &self.title;
        let root = root.margin(8, 20, 0, 0).titled(title, fitting(root, title, 20)).map_err(said)?;
        let label = (FONT, 15).into_text_style(&root);
        let widest = self.names.iter().filter_map(|n| Some(root.estimate_text_size(n, &label).ok()?.0)).max();
        let names_width = (widest.unwrap_or(0) + 16).min(root.dim_in_pixel().0 / 3);
        let (names, plots) = root.split_horizontally(names_width);
        let panels = plots.split_evenly((1, self.quantities.len()));
        let n = self.names.len();
        const BELOW: u32 = 44;
        let height = f64::from(root.dim_in_pixel().1 - BELOW - 8);
        for (i, name) in self.names.iter().enumerate() {
            let style =
                (FONT, 15).into_font().color(&series_color(i)).pos(Pos::new(HPos::Right, VPos::Center));
            let y = 8.0 + height * (i as f64 + 0.5) / n as f64;
            names.draw(&Text::new(name.clone(), (names_width as i32 - 8, y as i32), style)).map_err(said)?;
        }
        for (panel, quantity) in panels.iter().zip(&self.quantities) {
            let most = quantity.values.iter().map(|v| v[2]).fold(0.0, f64::max);
            let most = if most > 0.0 { most } else { 1.0 };
            let mut chart = ChartBuilder::on(panel)
                .margin_top(8)
                .margin_right(20)
                .x_label_area_size(BELOW)
                .build_cartesian_2d(0.0..most * 1.25, 0.0..n as f64)
                .map_err(said)?;
            chart
                .configure_mesh()
                .disable_y_mesh()
                .disable_y_axis()
                .x_labels(4)
                .x_desc(quantity.name)
                .label_style((FONT, 13))
                .axis_desc_style((FONT, 14))
                .max_light_lines(0)
                .draw()
                .map_err(said)?;
            for (i, [low, mid, high]) in quantity.values.iter().enumerate() {
                let (y, color) = ((n - i) as f64 - 0.5, series_color(i));
                let bar = Rectangle::new([(0.0, y - 0.28), (*mid, y + 0.28)], color.mix(0.55).filled());
                chart.draw_series([bar]).map_err(said)?;
                let whisker = PathElement::new([(*low, y), (*high, y)], color.stroke_width(3));
                chart.draw_series([whisker]).map_err(said)?;
                let text = match *mid {
                    x if x >= 100.0 => format!("{x:.0}"),
                    x if x >= 1.0 => format!("{x:.1}"),
                    x if x < 5e-5 => "0".to_owned(),
                    x if x >= 0.1 => format!("{x:.2}"),
                    x => format!("{x:.4}"),
                };
                let style = (FONT, 13).into_font().color(&BLACK).pos(Pos::new(HPos::Left, VPos::Center));
                let at = high.max(*mid) + most * 0.02;
                chart.draw_series([Text::new(text, (at, y), style)]).map_err(said)?;
            }
        }
        Ok(())
    }
}

/// Bytes in use and requests that run, over time, of the first runs.
pub struct Timeline {
    names: Vec<String>,
    runs: Vec<Vec<Moment>>,
}

#[derive(Deserialize)]
struct Moment {
    seconds: f64,
    pool_bytes: f64,
    running: f64,
}

/// What a panel shows of a moment.
type Shown = fn(&Moment) -> f64;

impl Timeline {
    /// From serve_timeline.csv: each arm's first run at the first load under the first budget.
    pub fn new(rows: &Table) -> Result<Self> {
        let rows = first_of(rows, &["request_rate", "budget_bytes"])?
            .query(|rows| rows.filter(col("repeat").eq(lit(0))))?;
        let runs = by_chain(&rows)?.into_iter().map(|(name, run)| Ok((name, run.rows()?)));
        let (names, runs) = runs.collect::<Result<Vec<_>>>()?.into_iter().unzip();
        Ok(Timeline { names, runs })
    }
}

impl Figure for Timeline {
    fn size(&self) -> (u32, u32) {
        (1200, 480)
    }

    fn draw<DB: DrawingBackend>(&self, root: &Area<DB>) -> Drawn {
        let title = "Bytes of keys and values, and requests that run, over time";
        let root = root.margin(8, 16, 0, 0).titled(title, fitting(root, title, 20)).map_err(said)?;
        let panels = root.split_evenly((1, 2));
        let last = self.runs.iter().flatten().map(|p| p.seconds).fold(1.0, f64::max);
        let of: [(&str, Shown); 2] = [
            ("MB in the pool, coded ones included", |p| p.pool_bytes / 1e6),
            ("requests that run", |p| p.running),
        ];
        for (n, (panel, (name, value))) in panels.iter().zip(of).enumerate() {
            let most = self.runs.iter().flatten().map(value).fold(1.0, f64::max);
            let mut chart = ChartBuilder::on(panel)
                .margin(12)
                .x_label_area_size(48)
                .y_label_area_size(66)
                .build_cartesian_2d(0.0..last * 1.02, 0.0..most * 1.6)
                .map_err(said)?;
            axes(&mut chart, "seconds", name)?;
            for (i, run) in self.runs.iter().enumerate() {
                let color = series_color(i);
                // Thin: thick lines are drawn with mitred corners, which stand out far above and below a sudden change.
                let line = LineSeries::new(run.iter().map(|p| (p.seconds, value(p))), color.stroke_width(1));
                chart
                    .draw_series(line)
                    .map_err(said)?
                    .label(self.names[i].clone())
                    .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], color.stroke_width(3)));
            }
            if n == 1 {
                legend(&mut chart, SeriesLabelPosition::UpperRight)?;
            }
        }
        Ok(())
    }
}
