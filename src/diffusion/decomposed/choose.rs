//! Choosing turning points from data: how much each component holds, how much may be lost by dropping it, and what a walk
//! then costs.

use super::operators::{Size, decompose};
use super::schedule::{Attenuation, Decomposition, MAX_TURNING_POINTS, Schedule};
use crate::error::{Error, Result, Status};

/// The mean square of each component's clean coordinates over a data set.
#[derive(Clone, Debug, PartialEq)]
pub struct Statistics {
    levels: usize,
    sums: Vec<f64>,
    counts: Vec<f64>,
}

impl Statistics {
    /// Of nothing yet, for the components of `levels` turning points.
    ///
    /// # Errors
    /// [`crate::Status::InvalidArgument`] for none and for more than [`MAX_TURNING_POINTS`].
    pub fn new(levels: usize) -> Result<Self> {
        if !(1..=MAX_TURNING_POINTS).contains(&levels) {
            return Err(Error::invalid_argument(format!(
                "{levels} turning points were asked for, 1..={MAX_TURNING_POINTS} are possible"
            )));
        }
        Ok(Self { levels, sums: vec![0.0; levels + 1], counts: vec![0.0; levels + 1] })
    }

    /// Takes in clean states: pictures in `[-1, 1]` or latents as the model sees them.
    ///
    /// # Errors
    /// [`crate::Status::InvalidArgument`] for sides that cannot be halved so often; [`crate::Status::NotFinite`].
    pub fn add(&mut self, states: &[f32], size: Size) -> Result<()> {
        if let Some(at) = states.iter().position(|value| !value.is_finite()) {
            return Err(Error::new(Status::NotFinite, format!("value {at} of the states is {}", states[at])));
        }
        let components = decompose(states, size, self.levels)?;
        let mut rest = &components[..];
        for level in 0..=self.levels {
            let low = size.halved(level)?.elements()?;
            let (part, after) = rest.split_at(if level == self.levels { low } else { low / 4 * 3 });
            self.sums[level] += part.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>();
            self.counts[level] += part.len() as f64;
            rest = after;
        }
        Ok(())
    }

    /// The mean square of component `i`'s coordinates, the finest first; 0 before anything was taken in.
    pub fn mean_square(&self, component: usize) -> f64 {
        self.sums[component] / self.counts[component].max(1.0)
    }
}

/// What is given up, and what may be.
#[derive(Clone, Debug, PartialEq)]
pub struct Budget {
    /// The most that dropping a component may cost, in nats per dimension ([`Schedule::drop_error`]).
    pub drop_error: f64,
    /// How the components vanish.
    pub attenuation: Attenuation,
    /// The cost of one model call at each stage, in any unit, measured perhaps; empty for calls that cost as much as they
    /// have pixels.
    pub stage_costs: Vec<f64>,
}

/// A schedule that was chosen, and what it was chosen by.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// The schedule, with the dropped components' spreads as `lift_std`.
    pub schedule: Schedule,
    /// For each turning point, the mean square of the dropped coordinates.
    pub mean_squares: Vec<f64>,
    /// For each turning point, the drop error at the lift, a time before it.
    pub drop_errors: Vec<f64>,
    /// The predicted cost of a walk over all times, as a share of the plain one's.
    pub cost: f64,
}

/// The earliest turning points within the budget: for each component, the finest first, the smallest `T` whose lift, at
/// time `T - 1`, has a drop error of at most [`Budget::drop_error`]. A component that is within it at no time is not
/// dropped, nor are those coarser than it.
///
/// Noise levels, what the model predicts and whether the models are ordinary ones are as in `like`; so are the class labels,
/// if the choice has as many stages.
///
/// # Errors
/// [`crate::Status::InvalidArgument`] for a budget that is not above 0, costs that are not, and statistics of nothing;
/// those of [`Schedule::new`].
pub fn choose_turning_points(like: &Schedule, statistics: &Statistics, budget: &Budget) -> Result<Choice> {
    check(statistics, budget)?;
    let attenuation = budget.attenuation;
    let never_dropped = like.turning_points().len();
    let drop_error = |component: usize, turning: usize| {
        let level = like.level(never_dropped, turning - 1).faded(attenuation.fade(turning - 1, turning));
        level.drop_error(statistics.mean_square(component))
    };
    let mut turning_points: Vec<usize> = Vec::new();
    for component in 0..statistics.levels {
        let least = turning_points.last().map_or(2, |last| last + 1);
        let affordable = |turning: &usize| drop_error(component, *turning) <= budget.drop_error;
        match (least..like.config().training.len()).find(affordable) {
            Some(turning) => turning_points.push(turning),
            None => break,
        }
    }
    let mean_squares: Vec<f64> = (0..turning_points.len()).map(|component| statistics.mean_square(component)).collect();
    let drop_errors = turning_points.iter().enumerate().map(|(component, turning)| drop_error(component, *turning));
    let drop_errors = drop_errors.collect();
    let labels = &like.decomposition().stage_class_labels;
    let schedule = like.with_decomposition(Decomposition {
        lift_std: mean_squares.iter().map(|mean_square| mean_square.sqrt()).collect(),
        stage_class_labels: if labels.len() == turning_points.len() + 1 { labels.clone() } else { Vec::new() },
        turning_points,
        attenuation,
        stage_sizes: Vec::new(),
        ordinary_models: like.decomposition().ordinary_models,
    })?;
    let cost = predicted_cost(&schedule, &budget.stage_costs);
    Ok(Choice { schedule, mean_squares, drop_errors, cost })
}

/// The cost of the calls at all times, as a share of as many calls at stage 0. Without costs a call counts as the pixels
/// that it sees.
pub fn predicted_cost(schedule: &Schedule, stage_costs: &[f64]) -> f64 {
    let times = schedule.config().training.len();
    let cost = |stage: usize| stage_costs.get(stage).copied().unwrap_or_else(|| 0.25_f64.powi(stage as i32));
    let all: f64 = (1..=times).map(|time| cost(schedule.stage(time))).sum();
    all / (times as f64 * cost(0))
}

fn check(statistics: &Statistics, budget: &Budget) -> Result<()> {
    let refuse = |text: String| Err(Error::invalid_argument(text));
    let positive = |value: f64| value.is_finite() && value > 0.0;
    if statistics.counts[0] == 0.0 {
        return refuse("the statistics are of no states".to_owned());
    }
    if !positive(budget.drop_error) {
        return refuse(format!("the drop error's budget is {}, must be finite and above 0", budget.drop_error));
    }
    if let Some(cost) = budget.stage_costs.iter().find(|cost| !positive(**cost)) {
        return refuse(format!("a stage's cost is {cost}, must be finite and above 0"));
    }
    if !budget.stage_costs.is_empty() && budget.stage_costs.len() != statistics.levels + 1 {
        let given = budget.stage_costs.len();
        return refuse(format!("{given} stage costs for {} stages", statistics.levels + 1));
    }
    Ok(())
}

/// Pixels around and inside the plot, and the decibels at its upper and lower edge.
const MARGIN: f64 = 48.0;
const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 320.0;
const MOST_DB: f64 = 60.0;
const LEAST_DB: f64 = -60.0;
const COLOURS: [&str; 4] = ["#c0392b", "#2471a3", "#1e8449", "#7d3c98"];

impl Choice {
    /// A plot as an SVG document: the signal to noise of each dropped component over time in decibels, its turning point,
    /// and in words its drop error; and the predicted cost.
    pub fn to_svg(&self) -> String {
        let times = self.schedule.config().training.len();
        let x = |time: usize| MARGIN + WIDTH * time as f64 / times as f64;
        let y = |decibels: f64| MARGIN + HEIGHT * (MOST_DB - decibels.clamp(LEAST_DB, MOST_DB)) / (MOST_DB - LEAST_DB);
        let (right, bottom) = (MARGIN + WIDTH, MARGIN + HEIGHT);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{}\" font-family=\"sans-serif\" \
             font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
            right + MARGIN,
            bottom + MARGIN
        );
        let text = |svg: &mut String, x: f64, y: f64, words: &str| {
            svg.push_str(&format!("<text x=\"{x:.1}\" y=\"{y:.1}\">{words}</text>\n"));
        };
        let title = format!("signal to noise in dB over time; a walk costs {:.3} of the plain one", self.cost);
        text(&mut svg, MARGIN, MARGIN - 16.0, &title);
        for decibels in [MOST_DB, 0.0, LEAST_DB] {
            let y = y(decibels);
            svg.push_str(&format!("<path d=\"M{MARGIN} {y:.1}H{right}\" stroke=\"#ccc\"/>\n"));
            text(&mut svg, 8.0, y + 4.0, &format!("{decibels}"));
        }
        text(&mut svg, MARGIN, bottom + 20.0, "0");
        text(&mut svg, right - 24.0, bottom + 20.0, &times.to_string());
        let dropped = self.schedule.turning_points().iter().zip(&self.mean_squares).zip(&self.drop_errors);
        for (component, ((turning, mean_square), drop_error)) in dropped.enumerate() {
            let colour = COLOURS[component % COLOURS.len()];
            let decibels = |time: usize| {
                let ratio = self.schedule.level(component, time).noise_ratio();
                10.0 * libm::log10(mean_square / (ratio * ratio))
            };
            let points: Vec<String> =
                (1..=*turning).map(|time| format!("{:.1},{:.1}", x(time), y(decibels(time)))).collect();
            svg.push_str(&format!(
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>\n\
                 <path d=\"M{:.1} {MARGIN}V{bottom}\" stroke=\"{colour}\" stroke-dasharray=\"4 4\"/>\n",
                points.join(" "),
                x(*turning)
            ));
            let words = format!("component {component}: dropped at {turning}, {drop_error:.2e} nats a dimension");
            text(&mut svg, MARGIN + 180.0, MARGIN + 20.0 + 18.0 * component as f64, &words);
        }
        svg.push_str("</svg>\n");
        svg
    }
}
