//! The noise levels that a model was trained with: cumulative signal per training timestep.

use crate::error::{Error, Result};

/// Cumulative signal power `alpha_bar_t` for each training timestep `t`, in `[0, 1]`, falling.
///
/// `x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise` (arXiv 2006.11239, eq. 4). Values are rounded to `f32`
/// where the training code rounded them (betas, alphas and the running product), because a model was trained with the
/// rounded ones: at the first timesteps `1 - alpha_bar` loses four digits to it. Values that are given as they are stay
/// `f64`.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainingSchedule {
    alphas_cumprod: Vec<f64>,
}

impl TrainingSchedule {
    /// From the noise added at each step, `beta_t` in `[0, 1)`.
    ///
    /// # Errors
    /// [`crate::Status::InvalidFile`] for an empty list or a value outside `[0, 1)`.
    pub fn from_betas(betas: &[f32]) -> Result<Self> {
        if betas.is_empty() {
            return Err(Error::invalid_file("trained_betas is empty"));
        }
        if let Some((t, beta)) = betas.iter().enumerate().find(|(_, beta)| !(0.0..1.0).contains(*beta)) {
            return Err(Error::invalid_file(format!("beta at timestep {t} is {beta}, must be in [0, 1)")));
        }
        Ok(Self { alphas_cumprod: running_product(betas) })
    }

    /// From the cumulative signal power itself, `alpha_bar_t` in `(0, 1]`, not rising.
    ///
    /// # Errors
    /// [`crate::Status::InvalidFile`] for an empty list, a value outside `(0, 1]` and a value above the one before.
    pub fn from_alphas_cumprod(alphas_cumprod: Vec<f64>) -> Result<Self> {
        if alphas_cumprod.is_empty() {
            return Err(Error::invalid_file("alphas_cumprod is empty"));
        }
        let mut before = 1.0;
        for (t, value) in alphas_cumprod.iter().enumerate() {
            if !(*value > 0.0 && *value <= before) {
                return Err(Error::invalid_file(format!(
                    "alphas_cumprod at timestep {t} is {value}, must be in (0, {before}]"
                )));
            }
            before = *value;
        }
        Ok(Self { alphas_cumprod })
    }

    /// Betas evenly spaced from `start` to `end`: `beta_schedule` `linear`.
    ///
    /// # Errors
    /// As [`TrainingSchedule::from_betas`].
    pub fn linear(start: f64, end: f64, length: usize) -> Result<Self> {
        Self::from_betas(&linspace(start, end, length))
    }

    /// Betas whose square roots are evenly spaced: `beta_schedule` `scaled_linear` (latent diffusion, arXiv 2112.10752).
    ///
    /// # Errors
    /// As [`TrainingSchedule::from_betas`].
    pub fn scaled_linear(start: f64, end: f64, length: usize) -> Result<Self> {
        let roots = linspace(start.sqrt(), end.sqrt(), length);
        Self::from_betas(&roots.into_iter().map(|root| root * root).collect::<Vec<_>>())
    }

    /// `alpha_bar(t) = cos^2((t + 0.008) / 1.008 * pi / 2)`, each beta at most 0.999: `beta_schedule`
    /// `squaredcos_cap_v2` (Nichol and Dhariwal 2021, arXiv 2102.09672, eq. 17).
    ///
    /// # Errors
    /// As [`TrainingSchedule::from_betas`].
    pub fn squared_cosine(length: usize) -> Result<Self> {
        let alpha_bar = |t: f64| libm::cos((t + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2).powi(2);
        let beta = |index: usize| {
            let (from, to) = (index as f64 / length as f64, (index + 1) as f64 / length as f64);
            (1.0 - alpha_bar(to) / alpha_bar(from)).min(0.999) as f32
        };
        Self::from_betas(&(0..length).map(beta).collect::<Vec<_>>())
    }

    /// The same schedule shifted and stretched so that the last timestep has no signal at all and the first is
    /// unchanged (arXiv 2305.08891, algorithm 1).
    pub fn with_zero_terminal_snr(&self) -> Self {
        let roots: Vec<f32> = self.alphas_cumprod.iter().map(|value| (*value as f32).sqrt()).collect();
        let (Some(first), Some(last)) = (roots.first().copied(), roots.last().copied()) else { return self.clone() };
        let scale = first / (first - last);
        let powers: Vec<f32> = roots.iter().map(|root| ((root - last) * scale).powi(2)).collect();
        let ratio = |index: usize| if index == 0 { powers[0] } else { powers[index] / powers[index - 1] };
        let betas: Vec<f32> = (0..powers.len()).map(|index| 1.0 - ratio(index)).collect();
        Self { alphas_cumprod: running_product(&betas) }
    }

    /// The same schedule whose last timestep keeps a signal power of `2^-24`, for samplers that divide by the signal.
    pub fn with_least_signal(mut self) -> Self {
        if let Some(last) = self.alphas_cumprod.last_mut() {
            *last = f64::powi(2.0, -24);
        }
        self
    }

    /// The number of training timesteps.
    pub fn len(&self) -> usize {
        self.alphas_cumprod.len()
    }

    /// Never: a schedule has at least one timestep.
    pub fn is_empty(&self) -> bool {
        self.alphas_cumprod.is_empty()
    }

    /// `alpha_bar_t`, for `t` clamped to the schedule.
    pub fn alpha_bar(&self, t: usize) -> f64 {
        self.alphas_cumprod[t.min(self.len() - 1)]
    }

    /// `sqrt((1 - alpha_bar_t) / alpha_bar_t)`: the noise's deviation beside a signal of 1, rounded to `f32`.
    pub fn noise_ratio(&self, t: usize) -> f64 {
        let alpha_bar = self.alpha_bar(t);
        f64::from(((1.0 - alpha_bar) / alpha_bar).sqrt() as f32)
    }

    /// [`TrainingSchedule::noise_ratio`] at a fractional timestep, linearly interpolated.
    pub fn noise_ratio_at(&self, t: f64) -> f64 {
        let last = self.len() - 1;
        let t = t.clamp(0.0, last as f64);
        let low = t.floor() as usize;
        let high = (low + 1).min(last);
        let (from, to) = (self.noise_ratio(low), self.noise_ratio(high));
        from + (to - from) * (t - low as f64)
    }

    /// The fractional timestep whose noise ratio is `sigma`, interpolated in the logarithm. Where the least signal that
    /// [`TrainingSchedule::with_least_signal`] leaves is above its neighbours', the earliest such timestep.
    pub fn timestep_of_noise_ratio(&self, sigma: f64) -> f64 {
        let log = libm::log(sigma.max(1e-10));
        // Single precision decides whether the noisiest ratio counts as the last timestep or as just before it.
        let log_at = |t: usize| f64::from(libm::log(self.noise_ratio(t)) as f32);
        let above = (0..self.len()).find(|t| log_at(*t) > log).unwrap_or(self.len());
        let low = above.saturating_sub(1).min(self.len().saturating_sub(2));
        let high = (low + 1).min(self.len() - 1);
        if low == high {
            return low as f64;
        }
        let weight = ((log_at(low) - log) / (log_at(low) - log_at(high))).clamp(0.0, 1.0);
        (1.0 - weight) * low as f64 + weight * high as f64
    }
}

/// `length` values from `start` to `end` in `f32`, counted from the nearer end as training code does.
fn linspace(start: f64, end: f64, length: usize) -> Vec<f32> {
    let (start, end) = (start as f32, end as f32);
    if length < 2 {
        return vec![start; length];
    }
    let step = (end - start) / (length - 1) as f32;
    let value = |index: usize| {
        if index < length / 2 { start + step * index as f32 } else { end - step * (length - 1 - index) as f32 }
    };
    (0..length).map(value).collect()
}

fn running_product(betas: &[f32]) -> Vec<f64> {
    let product = |product: &mut f64, beta: &f32| {
        *product *= f64::from(1.0 - beta);
        Some(f64::from(*product as f32))
    };
    betas.iter().scan(1.0, product).collect()
}
