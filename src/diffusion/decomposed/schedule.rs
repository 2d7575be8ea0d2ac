//! A decomposed process as data: noise levels, turning points, attenuation, and what a model was told at each stage.
//!
//! Times run from 0 (clean) to `T = num_train_timesteps`; time `t` is the training timestep `t - 1`.

use serde_json::{Map, Value, json};

use super::super::fields::Fields;
use super::super::schedule::{Kernel, Level, Posterior, Sampler, SchedulerConfig, check_fading};
use crate::error::{Error, Result, Status};

/// The most turning points: each halves the sides, and no state has so many halvings in it.
pub const MAX_TURNING_POINTS: usize = 14;
/// The fields of a decomposition beside those of a scheduler.
const FIELDS: [&str; 6] =
    ["turning_points", "attenuation", "lift_std", "stage_class_labels", "stage_sizes", "ordinary_models"];
/// The greatest exponent of the attenuation.
const MAX_POWER: f64 = 1000.0;

/// How fast a component vanishes that is dropped at time `T`: its signal is `r^((t / T)^q)` times that of a plain process.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attenuation {
    /// What is left of the signal at the drop, in `(0, 1]`; 1 is the process of subspace diffusion (arXiv 2205.01490).
    pub r: f64,
    /// How late it vanishes, at least 1.
    pub q: f64,
}

impl Attenuation {
    /// What is left at time `t` of the signal of a component that is dropped at time `dropped`.
    pub fn fade(self, t: usize, dropped: usize) -> f64 {
        libm::pow(self.r, libm::pow(t as f64 / dropped as f64, self.q))
    }
}

impl Default for Attenuation {
    fn default() -> Self {
        Self { r: 1.0, q: 1.0 }
    }
}

/// What a decomposed process has beside its scheduler.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Decomposition {
    /// Times `T_1 < T_2 < ...` in `2..T` from which on the state has half the sides. Empty for a plain process.
    pub turning_points: Vec<usize>,
    /// How the components vanish that will be dropped.
    pub attenuation: Attenuation,
    /// For each turning point, root mean square of the clean coordinates that are dropped there, so that a lift can put
    /// back their spread; 0 puts back noise alone. Empty for all 0.
    pub lift_std: Vec<f64>,
    /// For each stage, the class label that the model was trained with there. Empty if it takes none.
    pub stage_class_labels: Vec<i64>,
    /// For each stage, the side of the states that the model was trained with. Empty for any.
    pub stage_sizes: Vec<usize>,
    /// Whether the models are ordinary ones of pictures of each stage's size, which were not trained for the process: they
    /// are told the timestep of the noise beside the means of blocks of pixels. Nothing may fade then: `r` must be 1.
    pub ordinary_models: bool,
}

/// A decomposed process: DVDP (arXiv 2211.16032) over a scheduler of the diffusers layout.
///
/// The state of stage `k` (times `T_k <= t < T_{k+1}`) holds coordinates of the picture in blocks of `2^k x 2^k` pixels.
/// Component `i` is what stage `i` has and stage `i + 1` has not; the last one, which is never dropped, has index
/// [`Schedule::turning_points`]`.len()`.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    /// The scheduler's fields as they were read.
    scheduler: Map<String, Value>,
    config: SchedulerConfig,
    decomposition: Decomposition,
}

impl Schedule {
    /// Reads a JSON object with the fields of a `scheduler_config.json`, of which `_class_name` is `DDIMScheduler` and
    /// `timestep_spacing` is `trailing` if they are left out, and
    ///
    /// ```text
    /// "turning_points": [360, 720], "attenuation": {"r": 0.1, "q": 2.0}, "lift_std": [0.05, 0.1],
    /// "stage_class_labels": [1, 2, 3], "stage_sizes": [64, 32, 16], "ordinary_models": false
    /// ```
    ///
    /// all optional. `alphas_cumprod`, a list of `num_train_timesteps` numbers, may stand in place of betas. Other fields
    /// are kept.
    ///
    /// # Errors
    /// [`Status::InvalidFile`] for text that is not a JSON object and fields that are out of their ranges, by name; those
    /// of [`SchedulerConfig::from_json`]; with turning points [`Status::Unsupported`] for samplers other than DDPM, DDIM and
    /// DPM++ 2M and for Karras sigmas.
    pub fn from_json(text: &[u8]) -> Result<Self> {
        let value: Value =
            serde_json::from_slice(text).map_err(|e| Error::invalid_file(format!("not JSON: {e}")).caused_by(e))?;
        let Value::Object(mut scheduler) = value else { return Err(Error::invalid_file("not a JSON object")) };
        let decomposition = read(&Fields(&scheduler))?;
        for name in FIELDS {
            scheduler.remove(name);
        }
        Self::new(scheduler, decomposition)
    }

    /// A schedule from the fields of a `scheduler_config.json` and a decomposition.
    ///
    /// # Errors
    /// As [`Schedule::from_json`].
    pub fn new(mut scheduler: Map<String, Value>, decomposition: Decomposition) -> Result<Self> {
        for (name, default) in [("_class_name", Sampler::Ddim.class_name()), ("timestep_spacing", "trailing")] {
            scheduler.entry(name).or_insert_with(|| default.into());
        }
        let config = SchedulerConfig::from_fields(&scheduler, None)?;
        check(&decomposition, config.training.len())?;
        if !decomposition.turning_points.is_empty() {
            check_fading(&config)?;
        }
        Ok(Self { scheduler, config, decomposition })
    }

    /// The same scheduler with another decomposition.
    ///
    /// # Errors
    /// [`Status::InvalidFile`] for one that is out of its ranges.
    pub fn with_decomposition(&self, decomposition: Decomposition) -> Result<Self> {
        Self::new(self.scheduler.clone(), decomposition)
    }

    /// The same process walked by another sampler.
    ///
    /// # Errors
    /// Those of [`SchedulerConfig::from_json`].
    pub fn with_sampler(&self, sampler: Sampler) -> Result<Self> {
        let mut scheduler = self.scheduler.clone();
        scheduler.insert("_class_name".to_owned(), sampler.class_name().into());
        Self::new(scheduler, self.decomposition.clone())
    }

    /// The JSON object that [`Schedule::from_json`] reads as this schedule.
    pub fn to_json(&self) -> String {
        let Decomposition { turning_points, attenuation, lift_std, stage_class_labels, stage_sizes, ordinary_models } =
            &self.decomposition;
        let mut fields = self.scheduler.clone();
        fields.insert("turning_points".to_owned(), json!(turning_points));
        fields.insert("attenuation".to_owned(), json!({"r": attenuation.r, "q": attenuation.q}));
        for (name, value, default) in [
            ("lift_std", json!(lift_std), lift_std.is_empty()),
            ("stage_class_labels", json!(stage_class_labels), stage_class_labels.is_empty()),
            ("stage_sizes", json!(stage_sizes), stage_sizes.is_empty()),
            ("ordinary_models", json!(ordinary_models), !ordinary_models),
        ] {
            if !default {
                fields.insert(name.to_owned(), value);
            }
        }
        format!("{:#}", Value::Object(fields))
    }

    /// The scheduler: noise levels, what the model predicts, the sampler.
    pub fn config(&self) -> &SchedulerConfig {
        &self.config
    }

    /// What it has beside the scheduler.
    pub fn decomposition(&self) -> &Decomposition {
        &self.decomposition
    }

    /// Times at which the state changes its sides, rising.
    pub fn turning_points(&self) -> &[usize] {
        &self.decomposition.turning_points
    }

    /// The stage of time `t`: how often the sides are halved there.
    pub fn stage(&self, t: usize) -> usize {
        self.turning_points().iter().filter(|turning| **turning <= t).count()
    }

    /// `fade` of component `i` at time `t`: `r^((t / T_{i+1})^q)`, and 1 for the last component.
    pub fn fade(&self, component: usize, t: usize) -> f64 {
        let dropped = self.turning_points().get(component);
        dropped.map_or(1.0, |dropped| self.decomposition.attenuation.fade(t, *dropped))
    }

    /// The marginal of component `i` at time `t` in `0..=T`: `y_t = signal v + sigma noise`.
    pub fn level(&self, component: usize, t: usize) -> Level {
        let unfaded = match t.checked_sub(1) {
            Some(timestep) => Level::of_timestep(&self.config.training, timestep as f64),
            None => Level::CLEAN,
        };
        unfaded.faded(self.fade(component, t))
    }

    /// The kernel of component `i` from time `from` to a later `to`.
    pub fn kernel(&self, component: usize, from: usize, to: usize) -> Kernel {
        self.level(component, from).kernel_to(self.level(component, to))
    }

    /// The posterior of component `i` at time `to`, seen from a later `from`.
    pub fn posterior(&self, component: usize, from: usize, to: usize) -> Posterior {
        self.level(component, from).posterior_at(self.level(component, to))
    }

    /// What it costs to take component `i` for noise at time `t`: [`Level::drop_error`].
    pub fn drop_error(&self, component: usize, t: usize, mean_square: f64) -> f64 {
        self.level(component, t).drop_error(mean_square)
    }

    /// The class label of a stage, if the model was trained with one.
    pub fn class_label(&self, stage: usize) -> Option<i64> {
        self.decomposition.stage_class_labels.get(stage).copied()
    }

    /// Whether a model that was trained with `other` can be walked by this schedule: the noise levels and what the model
    /// predicts must be the same.
    ///
    /// # Errors
    /// [`Status::InvalidArgument`] with the first difference.
    pub fn check_model(&self, other: &SchedulerConfig) -> Result<()> {
        let differs = |what: &str, ours: &dyn std::fmt::Display, theirs: &dyn std::fmt::Display| {
            let text = format!("the schedule is another model's: its {what} is {ours}, the model's {theirs}");
            Err(Error::new(Status::InvalidArgument, text))
        };
        let (ours, theirs) = (&self.config, other);
        if ours.prediction != theirs.prediction {
            return differs("prediction_type", &ours.prediction.name(), &theirs.prediction.name());
        }
        if ours.training.len() != theirs.training.len() {
            return differs("num_train_timesteps", &ours.training.len(), &theirs.training.len());
        }
        let alpha_bars = |t: usize| (ours.training.alpha_bar(t), theirs.training.alpha_bar(t));
        // Schedules may be written with their cumulative products, rounded or not.
        let unlike = (0..ours.training.len()).find(|t| (alpha_bars(*t).0 - alpha_bars(*t).1).abs() > 1e-5);
        match unlike {
            None => Ok(()),
            Some(t) => differs(&format!("alpha_bar at timestep {t}"), &alpha_bars(t).0, &alpha_bars(t).1),
        }
    }
}

fn read(fields: &Fields<'_>) -> Result<Decomposition> {
    let positive = |name: &str| -> Result<Vec<usize>> {
        let values = fields.wholes(name)?.unwrap_or_default();
        let convert = |value: &i64| {
            let wrong = || Error::invalid_file(format!("{name} holds {value}, must hold whole numbers above 0"));
            usize::try_from(*value).ok().filter(|value| *value > 0).ok_or_else(wrong)
        };
        values.iter().map(convert).collect()
    };
    let attenuation = match fields.get("attenuation") {
        None => Attenuation::default(),
        Some(Value::Object(inner)) => {
            let number = |name: &str, least: f64, most: f64| {
                Fields(inner).number(name, 1.0, least, most).map_err(|error| error.at("attenuation"))
            };
            Attenuation { r: number("r", 0.0, 1.0)?, q: number("q", 1.0, MAX_POWER)? }
        }
        Some(other) => {
            return Err(Error::invalid_file(format!("attenuation is {other}, must be an object of r and q")));
        }
    };
    Ok(Decomposition {
        turning_points: positive("turning_points")?,
        attenuation,
        lift_std: fields.numbers("lift_std")?.unwrap_or_default(),
        stage_class_labels: fields.wholes("stage_class_labels")?.unwrap_or_default(),
        stage_sizes: positive("stage_sizes")?,
        ordinary_models: fields.flag("ordinary_models", false)?,
    })
}

fn check(decomposition: &Decomposition, times: usize) -> Result<()> {
    let Decomposition { turning_points, attenuation, lift_std, stage_class_labels, stage_sizes, ordinary_models } =
        decomposition;
    let refuse = |text: String| Err(Error::invalid_file(text));
    if turning_points.len() > MAX_TURNING_POINTS {
        return refuse(format!("{} turning_points, at most {MAX_TURNING_POINTS} are possible", turning_points.len()));
    }
    if let Some(outside) = turning_points.iter().find(|turning| !(2..times).contains(*turning)) {
        return refuse(format!("turning_points holds {outside}, must be in 2..={} (times run to {times})", times - 1));
    }
    if let Some(pair) = turning_points.windows(2).find(|pair| pair[0] >= pair[1]) {
        return refuse(format!("turning_points holds {} before {}: they must rise", pair[0], pair[1]));
    }
    let Attenuation { r, q } = *attenuation;
    if !(r > 0.0 && r <= 1.0 && (1.0..=MAX_POWER).contains(&q)) {
        return refuse(format!("attenuation is r = {r}, q = {q}; r must be in (0, 1] and q in [1, {MAX_POWER}]"));
    }
    if *ordinary_models && r != 1.0 {
        return refuse(format!("attenuation is r = {r}, but ordinary_models never saw detail that fades: r must be 1"));
    }
    let stages = turning_points.len() + 1;
    for (name, given, wanted) in [
        ("lift_std", lift_std.len(), stages - 1),
        ("stage_class_labels", stage_class_labels.len(), stages),
        ("stage_sizes", stage_sizes.len(), stages),
    ] {
        if given != 0 && given != wanted {
            return refuse(format!("{name} has {given} values, {} turning points ask for {wanted}", stages - 1));
        }
    }
    if let Some(std) = lift_std.iter().find(|std| !(std.is_finite() && **std >= 0.0)) {
        return refuse(format!("lift_std holds {std}, must be finite and not negative"));
    }
    if let Some(pair) = stage_sizes.windows(2).find(|pair| pair[0] / 2 != pair[1] || !pair[0].is_multiple_of(2)) {
        return refuse(format!("stage_sizes holds {} before {}: each stage has half the side", pair[0], pair[1]));
    }
    Ok(())
}
