//! Serving against load, and against the budget: throughput and the wait for the first token.

use super::canvas::{Area, Drawn, Figure, axes, fitting, legend, said, series_color};
use super::serving::{by_chain, first_of};
use crate::error::Result;
use crate::tables::Table;
use plotters::coord::combinators::BindKeyPoints;
use plotters::prelude::*;
use polars::prelude::{DataType, Expr, col, lit};
use serde::Deserialize;

/// One arm at one load under one budget.
#[derive(Deserialize)]
struct Point {
    at: f64,
    /// Tokens a second: least, median, most.
    output_throughput_low: f64,
    output_throughput: f64,
    output_throughput_high: f64,
    /// P95 of the time to the first token.
    p95_ttft_ms: f64,
}

impl Point {
    /// Seconds.
    fn wait(&self) -> f64 {
        self.p95_ttft_ms * 1e-3
    }
}

/// Arms along one axis, all else equal.
pub struct Curves {
    title: &'static str,
    axis: &'static str,
    arms: Vec<(String, Vec<Point>)>,
}

impl Curves {
    /// Along the rates of serve_summary.csv, under its first budget; none where there are fewer than two.
    pub fn of_loads(rows: &Table) -> Result<Option<Self>> {
        // "inf" where all requests come at once.
        let rate = col("request_rate").cast(DataType::Float64);
        let finite = rate.clone().is_finite();
        let rows = first_of(rows, &["budget_bytes"])?.query(|rows| rows.filter(finite))?;
        Self::along(&rows, "Serving against load", "requests a second that arrive (log)", rate)
    }

    /// Along the budgets of serve_summary.csv, at its first rate; none where there are fewer than two.
    pub fn of_budgets(rows: &Table) -> Result<Option<Self>> {
        let megabytes = col("budget_bytes") / lit(1e6);
        let rows = first_of(rows, &["request_rate"])?;
        let title = "Serving against the budget of KV bytes";
        Self::along(&rows, title, "budget of keys and values, MB (log)", megabytes)
    }

    fn along(rows: &Table, title: &'static str, axis: &'static str, at: Expr) -> Result<Option<Self>> {
        // Where all requests failed, nothing was served.
        let served =
            rows.query(|rows| rows.filter(col("p95_ttft_ms").gt(lit(0))).with_column(at.alias("at")))?;
        let sorted = |arm: &Table| arm.query(|rows| rows.sort(["at"], Default::default()))?.rows::<Point>();
        let arms = by_chain(&served)?.into_iter().map(|(name, arm)| Ok((name, sorted(&arm)?)));
        let arms: Vec<_> = arms.collect::<Result<_>>()?;
        let several = arms.iter().any(|(_, points)| points.len() > 1);
        Ok(several.then_some(Curves { title, axis, arms }))
    }
}

impl Figure for Curves {
    fn size(&self) -> (u32, u32) {
        (1200, 520)
    }

    fn draw<DB: DrawingBackend>(&self, root: &Area<DB>) -> Drawn {
        let root =
            root.margin(8, 16, 0, 0).titled(self.title, fitting(root, self.title, 20)).map_err(said)?;
        let (left, right) = root.split_horizontally(600);
        let points = || self.arms.iter().flat_map(|(_, points)| points);
        let first = points().map(|p| p.at).fold(f64::INFINITY, f64::min) / 1.15;
        let last = points().map(|p| p.at).fold(0.0, f64::max) * 1.15;
        // Marked where something was measured.
        let mut marks: Vec<f64> = points().map(|p| p.at).collect();
        marks.sort_by(f64::total_cmp);
        marks.dedup();
        let x = || (first..last).log_scale().with_key_points(marks.clone());
        let most = points().map(|p| p.output_throughput_high).fold(0.0, f64::max) * 1.15;
        let longest = points().map(|p| p.wait()).fold(0.0, f64::max);
        let shortest = points().map(|p| p.wait()).filter(|w| *w > 0.0).fold(longest, f64::min);
        let mut chart = ChartBuilder::on(&left);
        let chart = chart.margin(12).x_label_area_size(52).y_label_area_size(66);
        let mut panel = chart.build_cartesian_2d(x(), 0.0..most).map_err(said)?;
        axes(&mut panel, self.axis, "output tokens a second (least, median, most)")?;
        for (n, (_, points)) in self.arms.iter().enumerate() {
            let color = series_color(n);
            let line = points.iter().map(|p| (p.at, p.output_throughput));
            panel.draw_series(LineSeries::new(line.clone(), color.stroke_width(2))).map_err(said)?;
            panel.draw_series(line.map(|at| Circle::new(at, 4, color.filled()))).map_err(said)?;
            let bar = |p: &Point| {
                let (low, mid, high) =
                    (p.output_throughput_low, p.output_throughput, p.output_throughput_high);
                ErrorBar::new_vertical(p.at, low, mid, high, color.mix(0.5).filled(), 6)
            };
            panel.draw_series(points.iter().map(bar)).map_err(said)?;
        }
        let mut chart = ChartBuilder::on(&right);
        let chart = chart.margin(12).x_label_area_size(52).y_label_area_size(66);
        // Room for the legend above the curves.
        let waits = (shortest / 1.5..longest * (longest / shortest).max(4.0).powf(0.6)).log_scale();
        let mut panel = chart.build_cartesian_2d(x(), waits).map_err(said)?;
        axes(&mut panel, self.axis, "P95 of time to first token, s (log)")?;
        for (n, (name, points)) in self.arms.iter().enumerate() {
            let color = series_color(n);
            let line = points.iter().map(|p| (p.at, p.wait()));
            panel
                .draw_series(LineSeries::new(line.clone(), color.stroke_width(2)))
                .map_err(said)?
                .label(name.clone())
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], color.stroke_width(3)));
            panel.draw_series(line.map(|at| Circle::new(at, 4, color.filled()))).map_err(said)?;
        }
        legend(&mut panel, SeriesLabelPosition::UpperLeft)
    }
}
