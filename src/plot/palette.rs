//! Pictures in at most 256 colours: figures have few flat ones, and shades only at the edges of lines and letters.

use std::collections::HashMap;
use std::io;

type Color = [u8; 3];

/// The most frequent colours of RGB pixels, and for each pixel the nearest of them.
fn indexed(pixels: &[Color]) -> (Vec<Color>, Vec<u8>) {
    let mut counts: HashMap<Color, usize> = HashMap::new();
    pixels.iter().for_each(|p| *counts.entry(*p).or_default() += 1);
    let mut colors: Vec<(Color, usize)> = counts.into_iter().collect();
    colors.sort_unstable_by_key(|(color, count)| (std::cmp::Reverse(*count), *color));
    let palette: Vec<Color> = colors.iter().take(256).map(|c| c.0).collect();
    let distance = |a: Color, b: Color| (0..3).map(|i| i32::from(a[i].abs_diff(b[i])).pow(2)).sum::<i32>();
    let nearest =
        |color: Color| (0..palette.len()).min_by_key(|&i| distance(palette[i], color)).unwrap_or(0) as u8;
    let index: HashMap<Color, u8> = colors.iter().map(|(color, _)| (*color, nearest(*color))).collect();
    let indices = pixels.iter().map(|p| index[p]).collect();
    (palette, indices)
}

/// RGB pixels as PNG: less than half of what it would take with three bytes a pixel.
pub fn png(pixels: &[u8], width: u32, height: u32) -> io::Result<Vec<u8>> {
    let (palette, indices) = indexed(pixels.as_chunks().0);
    let mut encoded = Vec::new();
    let mut encoder = png::Encoder::new(&mut encoded, width, height);
    encoder.set_color(png::ColorType::Indexed);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_palette(palette.concat());
    // Flat colours compress best unfiltered.
    encoder.set_filter(png::FilterType::NoFilter);
    encoder.set_adaptive_filter(png::AdaptiveFilterType::NonAdaptive);
    encoder.set_compression(png::Compression::Best);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&indices)?;
    writer.finish()?;
    Ok(encoded)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Frequent colours stay as they are, rare ones become their nearest; the file reads back as that.
    #[test]
    fn frequent_colours_are_kept() {
        let flat: Vec<Color> = (0..200u8).flat_map(|i| [[i, 255 - i, 7]; 10]).collect();
        let rare: Vec<Color> = (0..200u8).map(|i| [i, 255 - i, 8]).collect();
        let pixels = [flat, rare].concat();
        let encoded = png(pixels.as_flattened(), 100, 22).unwrap();
        let mut reader = png::Decoder::new(&encoded[..]).read_info().unwrap();
        let palette: Vec<u8> = reader.info().palette.as_ref().unwrap().to_vec();
        let mut indices = vec![0; reader.output_buffer_size()];
        reader.next_frame(&mut indices).unwrap();
        assert_eq!(palette.len(), 3 * 256);
        for (pixel, index) in pixels.iter().zip(&indices) {
            let shown = &palette[3 * usize::from(*index)..][..3];
            assert!(shown[..2] == pixel[..2] && shown[2].abs_diff(pixel[2]) <= 1, "{pixel:?} {shown:?}");
            assert!(pixel[2] == 8 || shown == pixel);
        }
    }
}
