//! Plots, as SVG: every run is a point, so that a spread is seen and not only told.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::coord::ranged1d::{AsRangedCoord, Ranged, ValueFormatter};
use plotters::prelude::*;

/// Points of one kind, by where they stand.
#[derive(Debug, Clone, PartialEq)]
pub struct Series<T> {
    /// For the legend.
    pub name: String,
    /// The points.
    pub values: Vec<T>,
}

const SIZE: (u32, u32) = (900, 480);
/// Told apart by most eyes, and in grey (Okabe and Ito).
const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
];

fn colour(index: usize) -> RGBColor {
    COLOURS[index % COLOURS.len()]
}

/// A point for each value over its category, and a bar at the median; from zero.
///
/// # Errors
/// The file cannot be written.
pub fn dots(path: &Path, title: &str, axes: [&str; 2], series: &[Dots]) -> Result<()> {
    let Some(top) = largest(values(series)) else { return nothing(path, title) };
    draw(path, SIZE, |root| {
        dots_on(root, title, axes, 0.0..top * 1.4, None, series, Some(SeriesLabelPosition::UpperLeft))
    })
}

/// A series of values by their category.
pub type Dots = Series<(String, Vec<f64>)>;

/// One of two plots over the same categories.
#[derive(Debug)]
pub struct Panel<'a> {
    /// Its heading.
    pub title: &'a str,
    /// What its upright axis is.
    pub axis: &'a str,
    /// The points.
    pub series: &'a [Dots],
    /// A line across, where something is promised.
    pub limit: Option<f64>,
}

/// Two plots as [`dots`], one above the other, with logarithmic upright axes.
///
/// # Errors
/// The file cannot be written.
pub fn two_of_dots(path: &Path, across: &str, panels: [Panel<'_>; 2]) -> Result<()> {
    draw(path, (SIZE.0, SIZE.1 * 7 / 4), |root| {
        for (at, (panel, area)) in panels.iter().zip(root.split_evenly((2, 1))).enumerate() {
            let positive = || values(panel.series).chain(panel.limit).filter(|v| *v > 0.0);
            let (Some(top), Some(low)) = (largest(positive()), positive().min_by(f64::total_cmp)) else {
                continue;
            };
            let legend = (at == 0).then_some(SeriesLabelPosition::UpperLeft);
            let (low, top) = (low * 0.7, top * 1.4);
            // a third of the height, which no point is then behind
            let room = if legend.is_some() { (top / low).sqrt() } else { 1.0 };
            let range = (low..top * room).log_scale();
            dots_on(&area, panel.title, [across, panel.axis], range, panel.limit, panel.series, legend)?;
        }
        Ok(())
    })
}

fn values(series: &[Dots]) -> impl Iterator<Item = f64> {
    series.iter().flat_map(|s| s.values.iter().flat_map(|(_, values)| values.iter().copied()))
}

fn dots_on<Y>(
    area: &Root<'_>,
    title: &str,
    axes: [&str; 2],
    upright: Y,
    limit: Option<f64>,
    series: &[Dots],
    at: Option<SeriesLabelPosition>,
) -> Drawn
where
    Y: AsRangedCoord<Value = f64>,
    Y::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let categories: Vec<&str> =
        series.first().map(|s| s.values.iter().map(|(name, _)| name.as_str()).collect()).unwrap_or_default();
    let count = categories.len();
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..count as f64, upright)?;
    let name = |x: &f64| {
        let at = (x - 0.5).round();
        let is_middle = (x - 0.5 - at).abs() < 0.01 && at >= 0.0;
        if is_middle { categories.get(at as usize).unwrap_or(&"").to_string() } else { String::new() }
    };
    chart
        .configure_mesh()
        .disable_x_mesh()
        .max_light_lines(0)
        .x_desc(axes[0])
        .x_labels(count * 2 + 1)
        .x_label_formatter(&name)
        .y_desc(axes[1])
        .label_style(("sans-serif", 14))
        .draw()?;
    if let Some(limit) = limit {
        chart.draw_series(LineSeries::new([(0.0, limit), (count as f64, limit)], BLACK.mix(0.4)))?;
    }
    for (index, one) in series.iter().enumerate() {
        let colour = colour(index);
        let middle = |category: usize| {
            category as f64
                + 0.5
                + (index as f64 + 0.5 - series.len() as f64 / 2.0) * 0.8 / series.len() as f64
        };
        let points = one.values.iter().enumerate().flat_map(|(category, (_, values))| {
            values
                .iter()
                .map(move |value| Circle::new((middle(category), *value), 3, colour.mix(0.6).filled()))
        });
        chart
            .draw_series(points)?
            .label(&one.name)
            .legend(move |(x, y)| Circle::new((x + 8, y), 4, colour.filled()));
        chart.draw_series(one.values.iter().enumerate().filter(|(_, (_, v))| !v.is_empty()).map(
            |(category, (_, values))| {
                let (x, y) = (middle(category), crate::spread::median(values.iter().copied()));
                PathElement::new(vec![(x - 0.07, y), (x + 0.07, y)], colour.stroke_width(3))
            },
        ))?;
    }
    at.map_or(Ok(()), |at| legend(&mut chart, at))
}

/// Lines through points.
///
/// # Errors
/// The file cannot be written.
pub fn lines(path: &Path, title: &str, axes: [&str; 2], series: &[Series<(f64, f64)>]) -> Result<()> {
    let points = || series.iter().flat_map(|s| s.values.iter());
    let (Some(right), Some(top)) = (largest(points().map(|p| p.0)), largest(points().map(|p| p.1))) else {
        return nothing(path, title);
    };
    draw(path, SIZE, |root| {
        let mut chart = ChartBuilder::on(root)
            .caption(title, ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(44)
            .y_label_area_size(56)
            .build_cartesian_2d(0.0..right * 1.05, 0.0..top * 1.2)?;
        mesh(&mut chart, axes)?;
        for (index, one) in series.iter().enumerate() {
            let colour = colour(index);
            chart
                .draw_series(
                    LineSeries::new(one.values.iter().copied(), colour.stroke_width(2)).point_size(4),
                )?
                .label(&one.name)
                .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 16, y)], colour.stroke_width(3)));
        }
        legend(&mut chart, SeriesLabelPosition::LowerRight)
    })
}

/// Points in a plane of two like quantities, logarithmic, with the line on which they are equal.
///
/// # Errors
/// The file cannot be written.
pub fn against(path: &Path, title: &str, axes: [&str; 2], series: &[Series<(f64, f64)>]) -> Result<()> {
    let positive =
        || series.iter().flat_map(|s| s.values.iter().flat_map(|p| [p.0, p.1])).filter(|v| *v > 0.0);
    let (Some(top), Some(low)) = (largest(positive()), positive().min_by(f64::total_cmp)) else {
        return nothing(path, title);
    };
    let (low, top) = (10f64.powf(low.log10().floor()), top * 1.3);
    draw(path, SIZE, |root| {
        let mut chart = ChartBuilder::on(root)
            .caption(title, ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(44)
            .y_label_area_size(56)
            .build_cartesian_2d((low..top).log_scale(), (low..top).log_scale())?;
        mesh(&mut chart, axes)?;
        chart.draw_series(LineSeries::new([(low, low), (top, top)], BLACK.mix(0.4)))?;
        for (index, one) in series.iter().enumerate() {
            let colour = colour(index);
            let points = one.values.iter().filter(|p| p.0 > 0.0 && p.1 > 0.0);
            chart
                .draw_series(points.map(|p| Circle::new(*p, 3, colour.mix(0.6).filled())))?
                .label(&one.name)
                .legend(move |(x, y)| Circle::new((x + 8, y), 4, colour.filled()));
        }
        legend(&mut chart, SeriesLabelPosition::LowerRight)
    })
}

type Root<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type Chart<'a, 'b, X, Y> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<X, Y>>;
type Drawn = Result<(), Box<dyn std::error::Error>>;

fn draw(path: &Path, size: (u32, u32), content: impl FnOnce(&Root<'_>) -> Drawn) -> Result<()> {
    let root = SVGBackend::new(path, size).into_drawing_area();
    let drawn = root.fill(&WHITE).map_err(Into::into).and_then(|()| content(&root));
    let drawn = drawn.and_then(|()| root.present().map_err(Into::into));
    drawn.map_err(|e: Box<dyn std::error::Error>| anyhow!("{}: {e}", path.display()))
}

fn mesh<X, Y>(chart: &mut Chart<'_, '_, X, Y>, axes: [&str; 2]) -> Drawn
where
    X: Ranged<ValueType = f64> + ValueFormatter<f64>,
    Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let short = |v: &f64| format!("{}", (v * 100.0).round() / 100.0);
    chart
        .configure_mesh()
        .max_light_lines(0)
        .x_desc(axes[0])
        .y_desc(axes[1])
        .x_label_formatter(&short)
        .y_label_formatter(&short)
        .label_style(("sans-serif", 14))
        .draw()
        .map_err(Into::into)
}

fn legend<'a, 'b: 'a, X, Y>(chart: &mut Chart<'a, 'b, X, Y>, position: SeriesLabelPosition) -> Drawn
where
    X: Ranged<ValueType = f64> + 'a,
    Y: Ranged<ValueType = f64> + 'a,
{
    chart
        .configure_series_labels()
        .position(position)
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .label_font(("sans-serif", 14))
        .draw()
        .map_err(Into::into)
}

fn largest(values: impl Iterator<Item = f64>) -> Option<f64> {
    values.filter(|v| v.is_finite()).max_by(f64::total_cmp)
}

/// A plot that says that there is nothing to see.
fn nothing(path: &Path, title: &str) -> Result<()> {
    draw(path, SIZE, |root| {
        root.titled(&format!("{title}: nothing was measured"), ("sans-serif", 18))?;
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plots_are_written_with_their_names_and_also_when_there_is_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("p.svg");
        let read = || std::fs::read_to_string(&path).unwrap();
        let series = [Series { name: "ours".into(), values: vec![("one".to_owned(), vec![1.0, 2.0])] }];
        dots(&path, "dots", ["x", "GB/s"], &series).unwrap();
        assert!(read().contains("ours") && read().contains("one") && read().contains("GB/s"));
        let panel = |title, series, limit| Panel { title, axis: "s", series, limit };
        let none = [Series { name: "ours".into(), values: vec![("one".to_owned(), vec![])] }];
        two_of_dots(&path, "r", [panel("upper", &series, Some(0.3)), panel("lower", &none, Some(0.3))])
            .unwrap();
        assert!(read().contains("upper") && read().contains("lower") && read().contains("ours"));
        let series = [Series { name: "pairs".into(), values: vec![(0.0, 1.0), (1.0, 2.0), (300.0, 250.0)] }];
        against(&path, "against", ["x", "y"], &series).unwrap();
        assert!(read().contains("pairs"));
        lines(&path, "lines", ["x", "y"], &series).unwrap();
        assert!(read().contains("lines"));
        lines(&path, "lines", ["x", "y"], &[]).unwrap();
        assert!(read().contains("nothing was measured"));
    }
}
