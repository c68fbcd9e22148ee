//! One drawing, two files: PNG and SVG, with a font of our own so that a bare machine can draw.

use super::palette;
use crate::error::{Error, Result};
use crate::files;
use plotters::coord::Shift;
use plotters::coord::ranged1d::ValueFormatter;
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};
use std::path::{Path, PathBuf};

pub type Area<DB> = DrawingArea<DB, Shift>;
/// Why a backend could not draw.
pub type Drawn = std::result::Result<(), String>;

/// A figure that can be drawn on any backend.
pub trait Figure {
    /// Width and height in pixels.
    fn size(&self) -> (u32, u32);
    fn draw<DB: DrawingBackend>(&self, root: &Area<DB>) -> Drawn;
}

/// The family that all text uses; in SVG the viewer's own sans-serif stands in.
pub const FONT: &str = "sans-serif";

/// Writes `NAME.png` and `NAME.svg` into `folder`, with what the figure is of, small, in the lower left corner.
pub fn save(figure: &impl Figure, folder: &Path, name: &str, of: &str) -> Result<Vec<PathBuf>> {
    for (style, bytes) in
        [(FontStyle::Normal, dejavu::sans::regular()), (FontStyle::Bold, dejavu::sans::bold())]
    {
        register_font(FONT, style, bytes).map_err(|_| Error::Plot {
            path: folder.to_owned(),
            problem: "the built-in font is unusable".to_owned(),
        })?;
    }
    let (width, height) = figure.size();
    let png = folder.join(format!("{name}.png"));
    let svg = folder.join(format!("{name}.svg"));
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |problem: String| Error::Plot { path, problem }
    };

    let mut pixels = vec![0u8; (width * height * 3) as usize];
    draw(figure, of, &BitMapBackend::with_buffer(&mut pixels, (width, height)).into_drawing_area())
        .map_err(failed(&png))?;
    let encoded = palette::png(&pixels, width, height).map_err(|e| failed(&png)(e.to_string()))?;
    files::write_atomically(&png, |out| out.write_all(&encoded))?;

    let mut text = String::new();
    draw(figure, of, &SVGBackend::with_string(&mut text, (width, height)).into_drawing_area())
        .map_err(failed(&svg))?;
    files::write_atomically(&svg, |out| out.write_all(text.as_bytes()))?;
    Ok(vec![png, svg])
}

fn draw<DB: DrawingBackend>(figure: &impl Figure, of: &str, root: &Area<DB>) -> Drawn {
    root.fill(&WHITE).map_err(said)?;
    figure.draw(root)?;
    let style = (FONT, 12).into_font().color(&RGBColor(110, 110, 110));
    let below = root.dim_in_pixel().1 as i32 - 14;
    root.draw(&Text::new(of, (10, below), style)).map_err(said)?;
    root.present().map_err(said)
}

/// The font of a line across the figure: of `size` pixels, or smaller where the line would be wider than the figure.
pub fn fitting<DB: DrawingBackend>(root: &Area<DB>, line: &str, size: u32) -> (&'static str, u32) {
    let available = root.dim_in_pixel().0.saturating_sub(24);
    let wide = root.estimate_text_size(line, &(FONT, size).into_text_style(root)).map_or(0, |(wide, _)| wide);
    (FONT, if wide > available { size * available / wide } else { size })
}

/// Draws axes with their descriptions in the style of all charts. Numbers are printed as short as they can be.
pub fn axes<'a, DB, X, Y>(chart: &mut ChartContext<'a, DB, Cartesian2d<X, Y>>, x: &str, y: &str) -> Drawn
where
    DB: DrawingBackend + 'a,
    X: Ranged<ValueType = f64> + ValueFormatter<f64>,
    Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    chart
        .configure_mesh()
        .x_label_formatter(&|x| short(*x))
        .y_label_formatter(&|y| short(*y))
        .x_desc(x)
        .y_desc(y)
        .label_style((FONT, 15))
        .axis_desc_style((FONT, 16))
        .max_light_lines(0)
        .draw()
        .map_err(said)
}

/// Four digits at most; powers of ten below 0.001.
fn short(x: f64) -> String {
    if x != 0.0 && x.abs() < 9.9e-4 {
        return if x.abs() < 1e-9 { "0".to_owned() } else { format!("{x:.0e}") };
    }
    let rounded: f64 = format!("{x:.3e}").parse().unwrap_or(x);
    rounded.to_string()
}

/// Draws the legend of what was drawn so far.
pub fn legend<'a, DB, X, Y>(
    chart: &mut ChartContext<'a, DB, Cartesian2d<X, Y>>,
    position: SeriesLabelPosition,
) -> Drawn
where
    DB: DrawingBackend + 'a,
    X: Ranged<ValueType = f64>,
    Y: Ranged<ValueType = f64>,
{
    chart
        .configure_series_labels()
        .position(position)
        .background_style(WHITE.mix(0.9))
        .border_style(RGBColor(180, 180, 180))
        .label_font((FONT, 14))
        .draw()
        .map_err(said)
}

/// Colours of series: told apart by most colour-blind eyes (Okabe and Ito 2008, without their yellow), then darker ones.
pub fn series_color(n: usize) -> RGBColor {
    const COLORS: [(u8, u8, u8); 10] = [
        (0, 114, 178),
        (213, 94, 0),
        (0, 158, 115),
        (204, 121, 167),
        (86, 180, 233),
        (230, 159, 0),
        (90, 60, 160),
        (130, 130, 40),
        (120, 40, 40),
        (60, 60, 60),
    ];
    let (r, g, b) = COLORS[n % COLORS.len()];
    RGBColor(r, g, b)
}

/// A backend's error in words.
pub fn said(error: impl std::fmt::Display) -> String {
    error.to_string()
}
