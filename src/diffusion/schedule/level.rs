//! How noisy a component of the state is, and what follows from two levels: the kernel that leads to the noisier one, and
//! the posterior that leads back.

use super::TrainingSchedule;

/// `y = signal v + sigma noise` for a component `y` of the state with clean coordinates `v`.
///
/// The signal is `sqrt(alpha_bar)` times the component's *fade* in `(0, 1]`: 1 in a plain process, less for a component
/// that a decomposed process lets vanish faster. `sigma = sqrt(1 - alpha_bar)` is the same for all components.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Level {
    alpha_bar: f64,
    unfaded: f64,
    sigma: f64,
    fade: f64,
}

/// `y' = scale y + sqrt(variance) z`: one step towards noise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Kernel {
    /// Share of the signal that is kept, in `(0, 1]`.
    pub scale: f64,
    /// Variance of the added noise, never negative.
    pub variance: f64,
}

/// `y = state y' + clean v + sqrt(variance) z`: the step back from `y'`, once the clean coordinates `v` are known.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Posterior {
    /// Share of the noisier state.
    pub state: f64,
    /// Share of the clean coordinates.
    pub clean: f64,
    /// Variance of the added noise.
    pub variance: f64,
}

impl Level {
    /// The level without noise.
    pub const CLEAN: Self = Self { alpha_bar: 1.0, unfaded: 1.0, sigma: 0.0, fade: 1.0 };

    /// A level of signal power `alpha_bar` in `[0, 1]`.
    pub fn of_alpha_bar(alpha_bar: f64) -> Self {
        Self { alpha_bar, unfaded: alpha_bar.sqrt(), sigma: (1.0 - alpha_bar).sqrt(), fade: 1.0 }
    }

    /// A level whose noise has the deviation `ratio` beside a signal of 1.
    pub fn of_noise_ratio(ratio: f64) -> Self {
        let unfaded = 1.0 / (ratio * ratio + 1.0).sqrt();
        Self { alpha_bar: unfaded * unfaded, unfaded, sigma: ratio * unfaded, fade: 1.0 }
    }

    /// The level of a training timestep.
    pub fn of_timestep(training: &TrainingSchedule, t: f64) -> Self {
        Self::of_alpha_bar(training.alpha_bar(t as usize))
    }

    /// The same noise beside a signal of `fade` times this one's.
    pub fn faded(self, fade: f64) -> Self {
        Self { fade, ..self }
    }

    /// `signal` of `y = signal v + sigma noise`.
    pub fn signal(self) -> f64 {
        self.unfaded * self.fade
    }

    /// The signal of a component that does not fade: `sqrt(alpha_bar)`.
    pub fn unfaded_signal(self) -> f64 {
        self.unfaded
    }

    /// `sigma` of `y = signal v + sigma noise`.
    pub fn sigma(self) -> f64 {
        self.sigma
    }

    /// `sigma / signal`.
    pub fn noise_ratio(self) -> f64 {
        self.sigma / self.signal()
    }

    /// What it costs to take a component for noise here, if its clean coordinates have this mean square: an upper bound of
    /// the Kullback-Leibler divergence per dimension, in nats,
    ///
    /// ```text
    /// KL = signal^2 E[v^2] / (2 sigma^2)
    /// ```
    ///
    /// from `N(signal v, sigma^2)` to `N(0, sigma^2)`, averaged over `v`.
    pub fn drop_error(self, mean_square: f64) -> f64 {
        mean_square / (2.0 * self.noise_ratio() * self.noise_ratio())
    }

    /// The kernel that leads from here to a noisier level. With `a` the quotient of the signal powers and `f` that of the
    /// fades,
    ///
    /// ```text
    /// scale    = sqrt(a) f
    /// variance = sigma'^2 - scale^2 sigma^2 = (1 - a) + sigma^2 a (1 - f^2)
    /// ```
    ///
    /// of which the second form is a sum of what a plain process adds and what the fading takes away: nowhere negative.
    pub fn kernel_to(self, noisier: Self) -> Kernel {
        let alpha = noisier.alpha_bar / self.alpha_bar;
        let fade = noisier.fade / self.fade;
        let faded = (1.0 - self.alpha_bar) * alpha * (1.0 - fade * fade);
        Kernel { scale: alpha.sqrt() * fade, variance: (1.0 - alpha) + faded }
    }

    /// The posterior at the cleaner level `there`, seen from here (arXiv 2006.11239, eq. 7, for one component).
    pub fn posterior_at(self, there: Self) -> Posterior {
        let Kernel { scale, variance } = there.kernel_to(self);
        let (noise, noise_there) = (1.0 - self.alpha_bar, 1.0 - there.alpha_bar);
        Posterior {
            state: scale * noise_there / noise,
            clean: there.signal() * variance / noise,
            variance: noise_there / noise * variance,
        }
    }
}

/// One step of a walk: at a training timestep, from a level to a cleaner one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::diffusion) struct Leg {
    pub(in crate::diffusion) timestep: f64,
    pub(in crate::diffusion) here: Level,
    pub(in crate::diffusion) there: Level,
}
