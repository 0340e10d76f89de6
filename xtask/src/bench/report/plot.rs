//! Plots: for each section one picture, with a panel for each kind of work. A bar is a median, the line
//! across its end is from the lowest to the highest sample, and beside it stand the figure and the
//! ratio to the first reference.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Context as _, Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::register_font;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::{Better, Report, Section, Series, Spread, number, ratios};

/// Free fonts that systems have; which one is taken only decides how letters look.
const FONTS: [&str; 4] = [
    "/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf",
    "/usr/share/fonts/dejavu-sans-fonts/DejaVuSans.ttf",
    "/usr/share/fonts/TTF/DejaVuSans.ttf",
    "/usr/share/fonts/truetype/liberation/LiberationSans-Regular.ttf",
];
/// The name of the font in an SVG, where whoever shows it may take another.
const FONT: &str = "sans-serif";
/// Colours that are told apart whatever colours one sees (Okabe and Ito), the limit's being grey.
const COLOURS: [RGBColor; 7] = [
    RGBColor(0x99, 0x99, 0x99),
    RGBColor(0x00, 0x72, 0xb2),
    RGBColor(0x56, 0xb4, 0xe9),
    RGBColor(0xe6, 0x9f, 0x00),
    RGBColor(0xd5, 0x5e, 0x00),
    RGBColor(0x00, 0x9e, 0x73),
    RGBColor(0xcc, 0x79, 0xa7),
];
const INK: RGBColor = RGBColor(0x22, 0x22, 0x22);
const FAINT: RGBColor = RGBColor(0x66, 0x66, 0x66);

/// Measures of a picture, in pixels.
const COLUMNS: usize = 2;
const PANEL: i32 = 640;
const MARGIN: i32 = 16;
const TITLE: i32 = 44;
const HEADING: i32 = 30;
const BAR: i32 = 26;
/// Where bars begin, after the contenders' names, and how long they get before the figures.
const NAMES: i32 = 190;
const BARS: i32 = 250;

/// Draws every section as SVG and as PNG; gives the SVGs.
pub(super) fn draw(report: &Report, folder: &Path) -> Result<Vec<PathBuf>> {
    require()?;
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let mut plots = Vec::new();
    for section in &report.sections {
        let file = folder.join(file_name(&section.name));
        let picture = Picture::new(section);
        let (svg, png) = (file.with_extension("svg"), file.with_extension("png"));
        picture.svg(&svg).with_context(|| format!("cannot draw {}", svg.display()))?;
        picture.png(&png).with_context(|| format!("cannot draw {}", png.display()))?;
        plots.push(svg);
    }
    Ok(plots)
}

/// Finds a font, which text cannot do without.
pub(super) fn require() -> Result<()> {
    static BYTES: OnceLock<Option<Vec<u8>>> = OnceLock::new();
    let bytes = BYTES.get_or_init(|| FONTS.iter().find_map(|file| fs::read(file).ok()));
    let bytes = bytes
        .as_deref()
        .context("plots need a font: `cargo xtask setup` brings it (package fonts-dejavu-core)")?;
    register_font(FONT, FontStyle::Normal, bytes).map_err(|_| anyhow!("the font is broken"))
}

/// A section's name as that of a file.
fn file_name(name: &str) -> String {
    let words = name.split(|c: char| !c.is_ascii_alphanumeric()).filter(|it| !it.is_empty());
    words.map(str::to_ascii_lowercase).collect::<Vec<_>>().join("-")
}

/// A section and how much room it takes.
struct Picture<'a> {
    section: &'a Section,
    works: Vec<(&'a str, Vec<&'a Series>)>,
    /// Contenders in the order of their colours.
    contenders: Vec<&'a str>,
    panel_height: i32,
    size: (u32, u32),
}

impl<'a> Picture<'a> {
    fn new(section: &'a Section) -> Self {
        let works = section.works();
        let most = works.iter().map(|(_, all)| all.len()).max().unwrap_or_default();
        let length = |count: usize| i32::try_from(count).unwrap_or(i32::MAX / PANEL);
        let panel_height = HEADING + length(most) * BAR + MARGIN;
        let columns = COLUMNS.min(works.len()).max(1);
        let rows = works.len().div_ceil(columns);
        let size = (
            (length(columns) * PANEL + 2 * MARGIN).unsigned_abs(),
            (TITLE + length(rows) * panel_height + MARGIN).unsigned_abs(),
        );
        let contenders = section.contenders();
        Self { section, works, contenders, panel_height, size }
    }

    fn svg(&self, file: &Path) -> Result<()> {
        let area = SVGBackend::new(file, self.size).into_drawing_area();
        self.draw(&area)?;
        area.present().map_err(|error| anyhow!("{error}"))
    }

    fn png(&self, file: &Path) -> Result<()> {
        let (width, height) = self.size;
        let bytes = usize::try_from(width * height * 3).context("size of the picture")?;
        let mut pixels = vec![0; bytes];
        {
            let area = BitMapBackend::with_buffer(&mut pixels, self.size).into_drawing_area();
            self.draw(&area)?;
            area.present().map_err(|error| anyhow!("{error}"))?;
        }
        let mut encoder = png::Encoder::new(BufWriter::new(File::create(file)?), width, height);
        encoder.set_color(png::ColorType::Rgb);
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&pixels)?;
        writer.finish().context("write the picture")
    }

    fn draw<B: DrawingBackend>(&self, area: &DrawingArea<B, Shift>) -> Result<()> {
        area.fill(&WHITE).map_err(|error| anyhow!("{error}"))?;
        let pen = Pen { area };
        pen.text(&self.section.name, (MARGIN, MARGIN + 8), 21.0, INK, HPos::Left)?;
        if let Some(reference) = self.section.references.first() {
            let (right, text) = (i32::try_from(self.size.0)?, format!("×: ratio to {reference}"));
            pen.text(&text, (right - 3 * MARGIN, MARGIN + 8), 13.0, FAINT, HPos::Right)?;
        }
        let columns = COLUMNS.min(self.works.len()).max(1);
        for (index, (work, all)) in self.works.iter().enumerate() {
            let column = i32::try_from(index % columns)?;
            let row = i32::try_from(index / columns)?;
            let corner = (MARGIN + column * PANEL, TITLE + row * self.panel_height);
            self.panel(&pen, corner, work, all)?;
        }
        Ok(())
    }

    /// One kind of work: its heading, and a bar for each contender.
    fn panel<B: DrawingBackend>(
        &self,
        pen: &Pen<'_, B>,
        (left, top): (i32, i32),
        work: &str,
        all: &[&Series],
    ) -> Result<()> {
        let Some(first) = all.first() else { return Ok(()) };
        let good = match first.better {
            Better::Higher => "more is better",
            Better::Lower => "less is better",
        };
        pen.text(work, (left, top + 12), 16.0, INK, HPos::Left)?;
        let unit = format!("{}, {good}", first.unit);
        pen.text(&unit, (left + PANEL - 2 * MARGIN, top + 12), 13.0, FAINT, HPos::Right)?;
        let highest = all.iter().map(|it| it.spread().highest).fold(0.0, f64::max);
        let zero = left + NAMES;
        let to = |value: f64| {
            let share = if highest > 0.0 { value / highest } else { 0.0 };
            #[allow(clippy::cast_possible_truncation, reason = "between 0 and the bars' length")]
            let length = (share.clamp(0.0, 1.0) * f64::from(BARS)).round() as i32;
            zero + length
        };
        let reference = self.section.references.first();
        let reference = reference.and_then(|name| self.section.of(work, name));
        for (number_of, series) in all.iter().enumerate() {
            let y = top + HEADING + i32::try_from(number_of)? * BAR;
            let middle = y + BAR / 2 - 2;
            let spread = series.spread();
            pen.text(&series.contender, (zero - 8, middle), 14.0, INK, HPos::Right)?;
            let colour = self.contenders.iter().position(|name| *name == series.contender);
            let colour = COLOURS[colour.unwrap_or_default() % COLOURS.len()];
            pen.bar((zero, y), (to(spread.median).max(zero + 1), y + BAR - 5), colour)?;
            pen.range((to(spread.lowest), to(spread.highest)), middle)?;
            let ratio = reference
                .filter(|reference| series.unit != "%" && reference.contender != series.contender)
                .map(|reference| ratios(&series.samples, &reference.samples))
                .filter(|ratios| !ratios.is_empty())
                .map(|ratios| format!("   × {:.2}", Spread::of(&ratios).median));
            let figure = format!("{}{}", number(spread.median), ratio.unwrap_or_default());
            let beside = to(spread.highest).max(zero) + 8;
            pen.text(&figure, (beside, middle), 14.0, INK, HPos::Left)?;
        }
        let bottom = top + HEADING + i32::try_from(all.len())? * BAR - 3;
        pen.line((zero, top + HEADING - 3), (zero, bottom))
    }
}

/// Draws on an area, in pixels.
struct Pen<'a, B: DrawingBackend> {
    area: &'a DrawingArea<B, Shift>,
}

impl<B: DrawingBackend> Pen<'_, B> {
    fn text(
        &self,
        text: &str,
        place: (i32, i32),
        size: f64,
        colour: RGBColor,
        from: HPos,
    ) -> Result<()> {
        let style = TextStyle::from((FONT, size).into_font())
            .color(&colour)
            .pos(Pos::new(from, VPos::Center));
        self.area.draw_text(text, &style, place).map_err(|error| anyhow!("{error}"))
    }

    fn bar(&self, from: (i32, i32), to: (i32, i32), colour: RGBColor) -> Result<()> {
        let bar = Rectangle::new([from, to], colour.filled());
        self.area.draw(&bar).map_err(|error| anyhow!("{error}"))
    }

    fn line(&self, from: (i32, i32), to: (i32, i32)) -> Result<()> {
        let line = PathElement::new([from, to], INK.stroke_width(1));
        self.area.draw(&line).map_err(|error| anyhow!("{error}"))
    }

    /// A line from the lowest to the highest, with ends one sees where both are the same.
    fn range(&self, (lowest, highest): (i32, i32), y: i32) -> Result<()> {
        self.line((lowest, y), (highest, y))?;
        self.line((lowest, y - 4), (lowest, y + 4))?;
        self.line((highest, y - 4), (highest, y + 4))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_file_names() {
        assert_eq!(file_name("--wire gso, MTU 1500"), "wire-gso-mtu-1500");
    }
}
