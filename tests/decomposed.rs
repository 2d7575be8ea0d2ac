//! Decomposed diffusion: operators and kernels against their definitions, samplers against Gaussian data whose variances
//! are known, against a NumPy construction of subspace diffusion, and, without turning points, against the plain process.

mod support;

use macula::Status;
use macula::diffusion::decomposed::operators::{Size, assemble, decompose, down, up};
use macula::diffusion::decomposed::{
    Attenuation, Budget, Decomposition, Plan, Schedule, StagedStep, Statistics, Trajectory, choose_turning_points,
    predicted_cost,
};
use macula::diffusion::noise::standard_normal;
use macula::diffusion::schedule::{self, PlanOptions, Step};
use serde_json::{Map, Value, json};

const TIMES: usize = 1000;
/// Variance of the Gaussian data's low and high coordinates.
const LOW: f64 = 4.0;
const HIGH: f64 = 0.05;

fn normal(seed: u64, count: usize) -> Vec<f32> {
    let mut values = vec![0.0; count];
    standard_normal(seed, 0, 0, &mut values);
    values
}

fn energy(values: &[f32]) -> f64 {
    values.iter().map(|x| f64::from(*x).powi(2)).sum()
}

/// `1 - beta_t` multiplied up, `beta` from 1e-4 to 0.02 in even steps, nothing rounded.
fn linear() -> Vec<f64> {
    let beta = |t: usize| 1e-4 + (0.02 - 1e-4) * t as f64 / 999.0;
    (0..TIMES)
        .scan(1.0, |bar, t| {
            *bar *= 1.0 - beta(t);
            Some(*bar)
        })
        .collect()
}

fn fields(value: Value) -> Map<String, Value> {
    value.as_object().unwrap().clone()
}

fn schedule(class: &str, prediction: &str, turning_points: &[usize], r: f64, lift_std: &[f64]) -> Schedule {
    let scheduler = json!({
        "_class_name": class, "prediction_type": prediction, "alphas_cumprod": linear(), "clip_sample": false
    });
    let decomposition = Decomposition {
        turning_points: turning_points.to_vec(),
        attenuation: Attenuation { r, q: 1.0 },
        lift_std: lift_std.to_vec(),
        ..Decomposition::default()
    };
    Schedule::new(fields(scheduler), decomposition).unwrap()
}

#[test]
fn down_up_and_the_components_are_orthonormal() {
    let size = Size { planes: 6, height: 12, width: 20 };
    let low = Size { height: 6, width: 10, ..size };
    let (x, y) = (normal(1, size.elements().unwrap()), normal(2, low.elements().unwrap()));
    assert_eq!(down(&up(&y, low).unwrap(), size).unwrap(), y);
    let project = |x: &[f32]| up(&down(x, size).unwrap(), low).unwrap();
    let once = project(&x);
    assert_eq!(project(&once), once);
    let rest: Vec<f32> = x.iter().zip(&once).map(|(x, p)| x - p).collect();
    assert!((energy(&x) / (energy(&down(&x, size).unwrap()) + energy(&rest)) - 1.0).abs() < 1e-6);
    // <down x, y> = <x, up y>
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    assert!((dot(&down(&x, size).unwrap(), &y) - dot(&x, &up(&y, low).unwrap())).abs() < 1e-4);
    assert_eq!(down(&[1.0, 2.0, 3.0, 5.0], Size { planes: 1, height: 2, width: 2 }).unwrap(), [5.5]);

    let components = decompose(&x, size, 2).unwrap();
    let twice = down(&down(&x, size).unwrap(), low).unwrap();
    assert_eq!(components[components.len() - twice.len()..], twice);
    assert!((energy(&components[..size.elements().unwrap() * 3 / 4]) / energy(&rest) - 1.0).abs() < 1e-6);
    assert!(support::relative_error(&assemble(components.to_vec(), size, 2).unwrap(), &x) < 1e-6);
}

#[test]
fn the_basis_of_8_by_8_pictures_is_orthonormal_at_every_level() {
    let size = Size { planes: 1, height: 8, width: 8 };
    for levels in 0..=3 {
        let row = |at: usize| {
            let mut unit = vec![0.0; 64];
            unit[at] = 1.0;
            decompose(&unit, size, levels).unwrap().to_vec()
        };
        let rows: Vec<Vec<f32>> = (0..64).map(row).collect();
        for (i, a) in rows.iter().enumerate() {
            for (j, b) in rows.iter().enumerate() {
                let dot: f32 = a.iter().zip(b).map(|(a, b)| a * b).sum();
                assert!((dot - f32::from(u8::from(i == j))).abs() < 1e-6, "{levels} levels: {i} and {j}: {dot}");
            }
        }
    }
}

#[test]
fn kernels_compose_to_marginals_and_take_no_noise_away() {
    for base in [
        json!({"beta_schedule": "linear"}),
        json!({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
        json!({"beta_schedule": "squaredcos_cap_v2"}),
        json!({"alphas_cumprod": linear()}),
    ] {
        for (r, q) in [(1.0, 1.0), (0.1, 1.0), (0.1, 2.0), (0.001, 1.0), (0.001, 7.5)] {
            let decomposition = Decomposition {
                turning_points: vec![250, 700],
                attenuation: Attenuation { r, q },
                ..Decomposition::default()
            };
            let schedule = Schedule::new(fields(base.clone()), decomposition).unwrap();
            for component in 0..3 {
                let (mut signal, mut variance) = (1.0, 0.0);
                for t in 1..=schedule.turning_points().get(component).copied().unwrap_or(TIMES) {
                    let kernel = schedule.kernel(component, t - 1, t);
                    assert!(kernel.variance >= 0.0, "component {component} at {t}: {}", kernel.variance);
                    signal *= kernel.scale;
                    variance = kernel.scale * kernel.scale * variance + kernel.variance;
                    let level = schedule.level(component, t);
                    assert!((signal - level.signal()).abs() < 1e-12, "{t}: {signal} and {}", level.signal());
                    assert!((variance - level.sigma().powi(2)).abs() < 1e-12, "{t}: {variance}");
                    // In one stride from the beginning, and over any part of the way.
                    let stride = schedule.kernel(component, 0, t);
                    assert!((stride.scale - signal).abs() < 1e-12 && (stride.variance - variance).abs() < 1e-12);
                    let (from, half) = (schedule.level(component, t / 2), schedule.kernel(component, t / 2, t));
                    assert!((half.scale * from.signal() - signal).abs() < 1e-12);
                    assert!((half.scale.powi(2) * from.sigma().powi(2) + half.variance - variance).abs() < 1e-12);
                }
            }
        }
    }
}

/// What the best prediction for Gaussian data of variance `c` makes of a state: `E[eps | y] = sigma / (L^2 c + sigma^2) y`,
/// `E[v | y] = L c / (L^2 c + sigma^2) y`.
fn best(prediction: &str, step: &Step, c: f64, alpha_bar: f64) -> f64 {
    let power = step.signal * step.signal * c + step.sigma * step.sigma;
    let (noise, clean) = (step.sigma / power, step.signal * c / power);
    match prediction {
        "epsilon" => noise,
        "sample" => clean,
        _ => alpha_bar.sqrt() * noise - (1.0 - alpha_bar).sqrt() * clean,
    }
}

/// The coefficients of `component` in the steps in which it is alive, and the deviation that it begins with.
fn alive(plan: &Plan, component: usize) -> (Vec<Step>, f64) {
    let step = |staged: &StagedStep| component.checked_sub(staged.stage).map(|at| staged.components[at]);
    let steps: Vec<Step> = plan.steps().iter().filter_map(step).collect();
    let lifted = plan.steps().iter().rfind(|staged| staged.stage == component + 1);
    let lift = lifted.and_then(|staged| staged.lift);
    (steps, lift.unwrap_or(1.0))
}

/// The variance of a component at the end of a walk with the best predictions: `E[y^2]` and, for multistep samplers, the
/// moments with the clean prediction of the step before, all by recursion.
fn final_variance(plan: &Plan, component: usize, prediction: &str, c: f64) -> f64 {
    let bars = linear();
    let (steps, begin) = alive(plan, component);
    // Moments of (y, c'): E[y y], E[y c'], E[c' c'].
    let (mut yy, mut yc, mut cc) = (begin * begin, 0.0, 0.0);
    for step in steps {
        let g = best(prediction, &step, c, bars[step.timestep as usize]);
        let clean = step.clean_sample + step.clean_prediction * g;
        let k = step.next_sample + step.next_clean * clean + step.next_prediction * g;
        let m = step.next_previous;
        let next = k * k * yy + 2.0 * k * m * yc + m * m * cc + step.next_noise * step.next_noise;
        (yc, cc) = (clean * (k * yy + m * yc), clean * clean * yy);
        yy = next;
    }
    yy
}

/// r, and the high component's final variance after a lift by noise alone and by noise with the data's spread.
const ANCESTRAL: [(f64, f64, f64); 4] = [
    (1.0, 0.0483536103, 0.0483545318),
    (0.1, 0.0479644245, 0.0479644246),
    (0.01, 0.0475996120, 0.0475996120),
    (0.001, 0.0472517851, 0.0472517851),
];

#[test]
fn ancestral_sampling_of_gaussian_data_has_the_variances_that_it_must_have() {
    for prediction in ["epsilon", "v_prediction", "sample"] {
        for (r, noise_alone, with_spread) in ANCESTRAL {
            for (spread, expected) in [(vec![], noise_alone), (vec![HIGH.sqrt()], with_spread)] {
                let schedule = schedule("DDPMScheduler", prediction, &[500], r, &spread);
                let plan = Plan::new(&schedule, PlanOptions::new(TIMES)).unwrap();
                let (low, high) =
                    (final_variance(&plan, 1, prediction, LOW), final_variance(&plan, 0, prediction, HIGH));
                assert!((low - 3.9747765707).abs() < 1e-9, "{prediction}, r = {r}: low {low}");
                assert!((high - expected).abs() < 1e-9, "{prediction}, r = {r}: high {high}, not {expected}");
            }
        }
    }
}

#[test]
fn dropping_costs_what_the_closed_form_says() {
    // r, turning point, time, divergence per dimension for variance 0.05.
    for (r, turning, t, expected) in [
        (1.0, 500, 500, 2.1322e-3),
        (0.1, 500, 500, 2.1322e-5),
        (1.0, 500, 499, 2.1557e-3),
        (0.1, 500, 499, 2.1757e-5),
        (1.0, 250, 250, 2.7530e-2),
        (0.1, 250, 250, 2.7530e-4),
        (1.0, 750, 750, 8.4045e-5),
    ] {
        let error = schedule("DDPMScheduler", "epsilon", &[turning], r, &[]).drop_error(0, t, HIGH);
        assert!((error / expected - 1.0).abs() < 5e-5, "r = {r}, T = {turning}, t = {t}: {error:e}, not {expected:e}");
    }
}

/// DDIM (arXiv 2010.02502, eq. 12) with the best noise prediction, written from signal and sigma alone.
fn ddim_variance(schedule: &Schedule, times: &[usize], component: usize, c: f64, eta: f64, begin: f64) -> f64 {
    times.windows(2).fold(begin * begin, |variance, pair| {
        let (here, there) = (schedule.level(component, pair[0]), schedule.level(component, pair[1]));
        let (signal, sigma) = (here.signal(), here.sigma());
        let noise = sigma / (signal * signal * c + sigma * sigma);
        let scale = signal / there.signal();
        let kernel = sigma * sigma - scale * scale * there.sigma() * there.sigma();
        let added = eta * eta * there.sigma().powi(2) * kernel / (sigma * sigma);
        let direction = (there.sigma().powi(2) - added).max(0.0).sqrt();
        let k = there.signal() * (1.0 - sigma * noise) / signal + direction * noise;
        k * k * variance + added
    })
}

#[test]
fn ddim_of_gaussian_data_has_the_variances_of_its_own_recursion() {
    for (r, eta, steps) in [(1.0, 0.0, TIMES), (0.1, 0.0, 25), (0.1, 0.7, 25), (0.01, 1.0, 40), (0.001, 0.3, TIMES)] {
        let schedule = schedule("DDIMScheduler", "v_prediction", &[360, 720], r, &[0.0, 0.2]);
        let plan = Plan::new(&schedule, PlanOptions { eta, ..PlanOptions::new(steps) }).unwrap();
        let times: Vec<usize> = plan.steps().iter().map(|step| step.timestep() as usize + 1).chain([0]).collect();
        for (component, c) in [(0, HIGH), (1, 0.7), (2, LOW)] {
            let first = plan.steps().iter().position(|step| step.stage <= component).unwrap();
            let there = schedule.level(component, times[first]);
            let begin = match component {
                0 => there.sigma(),
                1 => (there.sigma().powi(2) + there.signal().powi(2) * 0.04).sqrt(),
                _ => 1.0,
            };
            let expected = ddim_variance(&schedule, &times[first..], component, c, eta, begin);
            let ours = final_variance(&plan, component, "v_prediction", c);
            assert!((ours - expected).abs() < 1e-9, "r = {r}, eta = {eta}, component {component}: {ours} {expected}");
        }
    }
}

/// DPM-Solver++ of second order (arXiv 2211.01095, algorithm 2) in log-SNRs, first order at the start, after a lift and at
/// the end; for Gaussian data every state is a multiple of the first.
fn multistep_factor(steps: &[Step], fresh: impl Fn(usize) -> bool, c: f64) -> f64 {
    let lambda = |step: &Step| (step.signal / step.sigma).ln();
    let (mut y, mut before) = (1.0, 0.0);
    for (index, step) in steps.iter().enumerate() {
        let clean = step.signal * c / (step.signal * step.signal * c + step.sigma * step.sigma) * y;
        y = match steps.get(index + 1) {
            None => clean,
            Some(next) => {
                let h = lambda(next) - lambda(step);
                let d = if fresh(index) {
                    clean
                } else {
                    let r = (lambda(step) - lambda(&steps[index - 1])) / h;
                    (1.0 + 1.0 / (2.0 * r)) * clean - before / (2.0 * r)
                };
                next.sigma / step.sigma * y - next.signal * ((-h).exp() - 1.0) * d
            }
        };
        before = clean;
    }
    y
}

#[test]
fn the_multistep_sampler_of_gaussian_data_has_the_variances_of_its_own_recursion() {
    for (r, steps) in [(1.0, 25), (0.1, 25), (0.1, 9), (0.01, 100), (0.001, 50)] {
        let schedule = schedule("DPMSolverMultistepScheduler", "epsilon", &[360, 720], r, &[]);
        let plan = Plan::new(&schedule, PlanOptions::new(steps)).unwrap();
        let stages: Vec<usize> = plan.steps().iter().map(|step| step.stage).collect();
        for (component, c) in [(0, HIGH), (1, 0.7), (2, LOW)] {
            let (steps, begin) = alive(&plan, component);
            let first = stages.len() - steps.len();
            let fresh = |index: usize| index == 0 || stages[first + index] != stages[first + index - 1];
            let expected = (begin * multistep_factor(&steps, fresh, c)).powi(2);
            let ours = final_variance(&plan, component, "epsilon", c);
            assert!((ours - expected).abs() < 1e-9, "r = {r}, component {component}: {ours} {expected}");
        }
    }
}

/// Sample paths of the high component, one number each, through the coefficients of the plan, for all rows of
/// [`ANCESTRAL`] at once. Noise is -1 or 1 with equal chances: it has the mean and the variance that a variance is made of.
#[test]
fn scalar_paths_have_the_variances_within_four_standard_errors() {
    let full = std::env::var_os("MACULA_FULL_TESTS").is_some_and(|value| value == "1");
    let paths = if full { 10_000_000 } else { 500_000 };
    let mut coefficients: Vec<[[f32; 8]; 2]> = Vec::new();
    let mut begins = [0.0_f32; 8];
    let mut expected = [0.0; 8];
    for (row, (r, noise_alone, with_spread)) in ANCESTRAL.into_iter().enumerate() {
        for (column, spread) in [vec![], vec![HIGH.sqrt()]].into_iter().enumerate() {
            let variant = 2 * row + column;
            expected[variant] = [noise_alone, with_spread][column];
            let schedule = schedule("DDPMScheduler", "epsilon", &[500], r, &spread);
            let (steps, begin) = alive(&Plan::new(&schedule, PlanOptions::new(TIMES)).unwrap(), 0);
            begins[variant] = begin as f32;
            coefficients.resize(steps.len(), [[0.0; 8]; 2]);
            for (step, [scales, noises]) in steps.iter().zip(&mut coefficients) {
                let g = best("epsilon", step, HIGH, 1.0);
                let scale = step.next_sample + step.next_clean * (step.clean_sample + step.clean_prediction * g);
                (scales[variant], noises[variant]) = (scale as f32, step.next_noise as f32);
            }
        }
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let moments = std::thread::scope(|scope| {
        let share = |thread: usize| (paths * (thread + 1) / threads) - (paths * thread / threads);
        let work = |thread: usize| {
            let (coefficients, begins) = (&coefficients, &begins);
            scope.spawn(move || walk_paths(share(thread), thread as u64, coefficients, begins))
        };
        let running: Vec<_> = (0..threads).map(work).collect();
        running.into_iter().map(|thread| thread.join().unwrap()).fold([[0.0; 2]; 8], |mut sum, part| {
            sum.iter_mut().zip(part).for_each(|(sum, part)| (sum[0], sum[1]) = (sum[0] + part[0], sum[1] + part[1]));
            sum
        })
    });
    for ([second, fourth], expected) in moments.into_iter().zip(expected) {
        let (second, fourth) = (second / paths as f64, fourth / paths as f64);
        let error = ((fourth - second * second) / paths as f64).sqrt();
        assert!((second - expected).abs() < 4.0 * error, "{second} is not {expected} within 4 times {error}");
        // The error is that of Gaussian paths: the noise's own shape is forgotten.
        assert!((error / (expected * (2.0 / paths as f64).sqrt()) - 1.0).abs() < 0.02, "{error}");
    }
}

/// Sums of the second and the fourth powers of the last states.
fn walk_paths(paths: usize, seed: u64, coefficients: &[[[f32; 8]; 2]], begins: &[f32; 8]) -> [[f64; 2]; 8] {
    // SplitMix64 (Steele et al. 2014), 64 signs a call.
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut bits = move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let sign = |bits: u64| f32::from_bits(1.0_f32.to_bits() | (bits as u32 & 1) << 31);
    let mut moments = [[0.0; 2]; 8];
    for _ in 0..paths {
        let first = sign(bits());
        let mut y = begins.map(|begin| begin * first);
        for steps in coefficients.chunks(64) {
            let mut signs = bits();
            for [scales, noises] in steps {
                let z = sign(signs);
                signs >>= 1;
                for variant in 0..8 {
                    y[variant] = scales[variant] * y[variant] + noises[variant] * z;
                }
            }
        }
        for (moment, y) in moments.iter_mut().zip(y) {
            let square = f64::from(y * y);
            (moment[0], moment[1]) = (moment[0] + square, moment[1] + square * square);
        }
    }
    moments
}

/// Whole states of Gaussian data walked with noise from a seed, lifts included.
#[test]
fn whole_states_of_gaussian_data_have_the_variances_too() {
    let shape = [1, 3, 64, 64];
    let size = Size { planes: 3, height: 64, width: 64 };
    for (class, r) in [("DDPMScheduler", 0.1), ("DPMSolverMultistepScheduler", 1.0)] {
        let schedule = schedule(class, "epsilon", &[300, 600], r, &[0.0, 0.3]);
        let plan = Plan::new(&schedule, PlanOptions::new(50)).unwrap();
        let variances = [HIGH, 0.7, LOW];
        let expected: Vec<f64> =
            (0..3).map(|component| final_variance(&plan, component, "epsilon", variances[component])).collect();
        let mut walk = Trajectory::new(plan, shape).unwrap();
        let length = |shape: [usize; 4]| shape.iter().product::<usize>();
        let mut state = walk.begin(&normal(9, length(walk.shape())), None).unwrap();
        while let Some((index, step)) = walk.current() {
            let (stage, here) = (step.stage, Size { planes: 3, height: 64 >> step.stage, width: 64 >> step.stage });
            let levels = step.components.len() - 1;
            let mut prediction = decompose(&state, here, levels).unwrap().to_vec();
            let mut at = 0;
            for (component, coefficients) in (stage..).zip(&step.components) {
                let last = here.halved(component - stage).unwrap().elements().unwrap();
                let count = if component == 2 { last } else { last / 4 * 3 };
                let g = best("epsilon", coefficients, variances[component], 1.0);
                prediction[at..at + count].iter_mut().for_each(|value| *value = (g * f64::from(*value)) as f32);
                at += count;
            }
            let prediction = assemble(prediction, here, levels).unwrap();
            let noise = step.needs_noise().then(|| normal(100 + index as u64, state.len()));
            let lift = step.lift.map(|_| normal(1000 + index as u64, 4 * state.len()));
            walk.step(&mut state, &prediction, noise.as_deref(), lift.as_deref()).unwrap();
            assert_eq!(state.len(), length(walk.shape()));
        }
        let components = decompose(&state, size, 2).unwrap();
        let mut rest = &components[..];
        for (count, expected) in [9216, 2304, 768].into_iter().zip(expected) {
            let variance = energy(&rest[..count]) / count as f64;
            let error = expected * (2.0 / count as f64).sqrt();
            assert!((variance - expected).abs() < 4.0 * error, "{class}: {variance} is not {expected} within {error}");
            rest = &rest[count..];
        }
    }
}

#[test]
fn one_stage_without_attenuation_is_subspace_diffusion() {
    let folder = support::fixture("subspace_diffusion.py", &[]);
    let described: Value = serde_json::from_slice(&std::fs::read(folder.join("cases.json")).unwrap()).unwrap();
    let values = support::read_f32(folder.join("values.f32"));
    let side = described["side"].as_u64().unwrap() as usize;
    let steps = described["steps"].as_u64().unwrap() as usize;
    let count = side * side;
    let (start, rest) = values.split_at(count / 4);
    let (lift, rest) = rest.split_at(count);
    let (noises, mut states) = rest.split_at((steps + 1) * count);
    let model = |x: &[f32], t: f64| -> Vec<f32> {
        x.iter().map(|x| f64::from(*x)).map(|x| (0.3 * x + 0.5 * (3.0 * x + t / 100.0).sin() - 0.2) as f32).collect()
    };
    let cases = described["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 8);
    for case in cases {
        let scheduler = json!({
            "_class_name": case["kind"], "alphas_cumprod": described["alphas_cumprod"], "clip_sample": false
        });
        let decomposition = Decomposition {
            turning_points: vec![case["turning"].as_u64().unwrap() as usize],
            lift_std: vec![case["spread"].as_f64().unwrap()],
            ..Decomposition::default()
        };
        let schedule = Schedule::new(fields(scheduler), decomposition).unwrap();
        let plan = Plan::new(&schedule, PlanOptions::new(steps)).unwrap();
        let mut walk = Trajectory::new(plan, [1, 1, side, side]).unwrap();
        let mut state = walk.begin(start, None).unwrap();
        for length in case["states"].as_array().unwrap() {
            let (index, step) = walk.current().unwrap();
            let prediction = model(&state, step.timestep());
            let noise = &noises[index * count..(index + 1) * count];
            let half = down(noise, Size { planes: 1, height: side, width: side }).unwrap();
            let noise = if step.stage == 1 { &half } else { noise };
            let lift = step.lift.map(|_| lift);
            walk.step(&mut state, &prediction, Some(noise), lift).unwrap();
            let (expected, rest) = states.split_at(length.as_u64().unwrap() as usize);
            states = rest;
            let error = support::relative_error(&state, expected);
            assert!(error < 1e-5, "{case}: step {index} differs by {error:e}");
        }
        assert!(walk.current().is_none());
    }
    assert!(states.is_empty());
}

/// The plain walk as the manual of [`Step`] says it, one rounding a step.
fn plain_walk(plan: &schedule::Plan, start: &[f32], clean: Option<&[f32]>) -> Vec<Vec<f32>> {
    let first = plan.steps[plan.start];
    let begin = |at: usize, z: &f32| match clean {
        None => plan.initial_sigma * f64::from(*z),
        Some(clean) => first.signal * f64::from(clean[at]) + first.sigma * f64::from(*z),
    };
    let mut x: Vec<f32> = start.iter().enumerate().map(|(at, z)| begin(at, z) as f32).collect();
    let mut before = vec![0.0_f32; x.len()];
    let mut states = vec![x.clone()];
    for (index, s) in plan.steps.iter().enumerate().skip(plan.start) {
        let noise = normal(50 + index as u64, x.len());
        for at in 0..x.len() {
            let (state, p) = (f64::from(x[at]), f64::from(prediction(x[at], s.timestep)));
            let c = s.clean_sample * state + s.clean_prediction * p;
            let c = s.clip.map_or(c, |clip| c.clamp(-clip, clip));
            let mut next = s.next_sample * state + s.next_clean * c + s.next_prediction * p;
            if s.next_previous != 0.0 {
                next += s.next_previous * f64::from(before[at]);
            }
            if s.next_noise != 0.0 {
                next += s.next_noise * f64::from(noise[at]);
            }
            (x[at], before[at]) = (next as f32, c as f32);
        }
        states.push(x.clone());
    }
    states
}

fn prediction(x: f32, t: f64) -> f32 {
    let x = f64::from(x);
    (0.3 * x + 0.5 * (3.0 * x + t / 100.0).sin() - 0.2) as f32
}

#[test]
fn without_turning_points_it_is_the_plain_sampler_bit_for_bit() {
    let scheduler = json!({"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"});
    for (class, steps, start, eta) in [
        ("DDPMScheduler", 20, 0, 0.0),
        ("DDIMScheduler", 20, 0, 0.0),
        ("DDIMScheduler", 30, 0, 0.6),
        ("DDIMScheduler", 20, 7, 0.0),
        ("DPMSolverMultistepScheduler", 20, 0, 0.0),
        ("DPMSolverMultistepScheduler", 20, 5, 0.0),
        ("EulerDiscreteScheduler", 20, 0, 0.0),
        ("EulerAncestralDiscreteScheduler", 20, 0, 0.0),
    ] {
        let mut scheduler = fields(scheduler.clone());
        scheduler.insert("_class_name".into(), class.into());
        let schedule = Schedule::new(scheduler, Decomposition::default()).unwrap();
        let options = PlanOptions { steps, start, eta };
        let plain = schedule::Plan::new(schedule.config(), options).unwrap();
        let (noise, clean) = (normal(1, 96), normal(2, 96));
        let clean = (start > 0).then_some(&clean[..]);
        let expected = plain_walk(&plain, &noise, clean);
        let mut walk = Trajectory::new(Plan::new(&schedule, options).unwrap(), [2, 3, 4, 4]).unwrap();
        let mut state = walk.begin(&noise, clean).unwrap();
        assert_eq!(state, expected[0]);
        for expected in &expected[1..] {
            let (index, step) = walk.current().unwrap();
            let predicted: Vec<f32> = state.iter().map(|x| prediction(*x, step.timestep())).collect();
            let noise = normal(50 + index as u64, state.len());
            walk.step(&mut state, &predicted, Some(&noise), None).unwrap();
            assert_eq!(state, *expected, "{class}: step {index}");
        }
        assert!(walk.current().is_none());
    }
}

/// The component that is never dropped walks as in a plain process, to the last bit, wherever the same times are visited.
#[test]
fn the_last_component_has_the_coefficients_of_the_plain_process() {
    for (class, steps) in [("DDPMScheduler", 1000), ("DDIMScheduler", 25), ("DPMSolverMultistepScheduler", 25)] {
        let schedule = schedule(class, "v_prediction", &[360, 720], 0.1, &[]);
        let staged = Plan::new(&schedule, PlanOptions::new(steps)).unwrap();
        let plain = schedule::Plan::new(schedule.config(), PlanOptions::new(steps)).unwrap();
        assert_eq!(staged.steps().len(), plain.steps.len());
        for (index, (staged_step, plain)) in staged.steps().iter().zip(&plain.steps).enumerate() {
            let lifted = index > 0 && staged.steps()[index - 1].lift.is_some();
            if class == "DPMSolverMultistepScheduler" && lifted {
                assert_eq!(staged_step.last().next_previous, 0.0);
                assert_ne!(plain.next_previous, 0.0);
            } else {
                assert_eq!(staged_step.last(), plain, "{class}: step {index}");
            }
        }
    }
}

/// An ordinary model of smaller pictures knows the means of blocks at a variance-preserving level: its best prediction must
/// lead where the best prediction for the coordinates themselves leads.
#[test]
fn ordinary_models_serve_later_stages_at_the_effective_noise_level() {
    let bars = linear();
    for class in ["DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"] {
        for prediction in ["epsilon", "v_prediction", "sample"] {
            let trained = schedule(class, prediction, &[360, 720], 1.0, &[0.0, 0.3]);
            let ordinary = Decomposition { ordinary_models: true, ..trained.decomposition().clone() };
            let ordinary = trained.with_decomposition(ordinary).unwrap();
            let plan_of = |schedule| Plan::new(schedule, PlanOptions::new(25)).unwrap();
            let (trained, ordinary) = (plan_of(&trained), plan_of(&ordinary));
            for (theirs, ours) in trained.steps().iter().zip(ordinary.steps()) {
                assert_eq!((theirs.stage, theirs.lift), (ours.stage, ours.lift));
                if theirs.stage == 0 {
                    assert_eq!(theirs, ours);
                    continue;
                }
                let (unit, plain) = (f64::from(1 << theirs.stage), *theirs.last());
                let norm = (unit * plain.signal).hypot(plain.sigma);
                let model = Step { signal: unit * plain.signal / norm, sigma: plain.sigma / norm, ..plain };
                let alpha_bar = model.signal * model.signal;
                for (theirs, ours) in theirs.components.iter().zip(&ours.components) {
                    assert!((ours.input_scale * norm - 1.0).abs() < 1e-12);
                    let p = best(prediction, &plain, LOW, plain.signal * plain.signal);
                    let q = ours.input_scale * best(prediction, &model, LOW / (unit * unit), alpha_bar);
                    let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-9, "{class}, {prediction}: {a} is not {b}");
                    close(ours.clean(1.0, q), theirs.clean(1.0, p));
                    close(ours.next(1.0, 0.7, q), theirs.next(1.0, 0.7, p));
                    close(ours.next_noise, theirs.next_noise);
                    // The timestep that it is told has its signal power.
                    let around = [ours.timestep.floor(), ours.timestep.ceil()].map(|t| bars[t as usize]);
                    assert!(around[0] + 1e-6 > alpha_bar && around[1] < alpha_bar + 1e-6, "{around:?}, {alpha_bar}");
                    assert!(ours.timestep < theirs.timestep);
                }
            }
        }
    }
}

#[test]
fn a_walk_can_begin_at_any_step_from_a_clean_state() {
    let schedule = schedule("DDIMScheduler", "epsilon", &[360, 720], 0.1, &[]);
    let clean = normal(4, 3 * 64 * 64);
    let full = Size { planes: 3, height: 64, width: 64 };
    for start in [0, 5, 12, 20] {
        let plan = Plan::new(&schedule, PlanOptions { start, ..PlanOptions::new(25) }).unwrap();
        let walk = Trajectory::new(plan, [1, 3, 64, 64]).unwrap();
        let (stage, [_, _, height, width]) = (walk.stage(), walk.shape());
        let noise = normal(5, 3 * height * width);
        let state = walk.begin(&noise, Some(&clean)).unwrap();
        // signal * component of the clean state + sigma * noise, component by component.
        let step = walk.current().unwrap().1.clone();
        let components = decompose(&clean, full, 2).unwrap();
        let alive = &components[components.len() - state.len()..];
        let here = Size { planes: 3, height, width };
        let (state, noise) = (decompose(&state, here, 2 - stage).unwrap(), decompose(&noise, here, 2 - stage).unwrap());
        let bounds = [9216, 11520, 12288].map(|end: usize| end.saturating_sub(components.len() - state.len()));
        for (at, value) in state.iter().enumerate() {
            let component = bounds.iter().filter(|end| **end > 0).position(|end| at < *end).unwrap();
            let step = &step.components[component];
            let expected = step.signal * f64::from(alive[at]) + step.sigma * f64::from(noise[at]);
            assert!((f64::from(*value) - expected).abs() < 1e-5, "start {start}, value {at}");
        }
    }
}

#[test]
fn clipping_is_done_on_whole_pictures_of_full_scale() {
    let scheduler = json!({"_class_name": "DDIMScheduler", "prediction_type": "sample", "clip_sample_range": 0.5});
    let decomposition = Decomposition {
        turning_points: vec![300, 600],
        attenuation: Attenuation { r: 0.1, q: 2.0 },
        ..Decomposition::default()
    };
    let schedule = Schedule::new(fields(scheduler), decomposition).unwrap();
    let mut walk = Trajectory::new(Plan::new(&schedule, PlanOptions::new(10)).unwrap(), [1, 1, 16, 16]).unwrap();
    let mut state = walk.begin(&normal(1, 16), None).unwrap();
    while let Some((index, step)) = walk.current() {
        // A clean prediction in coordinates: 2^stage times pixels, some of them out of range.
        let scale = f32::from(1_u8 << step.stage);
        let clean: Vec<f32> = normal(index as u64, state.len()).iter().map(|x| x * scale).collect();
        let lift = step.lift.map(|_| normal(9, 4 * state.len()));
        let denoised = walk.step(&mut state, &clean, None, lift.as_deref()).unwrap();
        for (given, shown) in clean.iter().zip(&denoised) {
            assert!(((given / scale).clamp(-0.5, 0.5) - shown).abs() < 1e-5, "step {index}: {given} became {shown}");
        }
    }
}

#[test]
fn calls_and_pixels_are_those_of_the_formula() {
    for turning in [vec![500], vec![300, 600], vec![250, 500], vec![200, 400, 600, 800], vec![2], vec![999]] {
        let schedule = schedule("DDPMScheduler", "epsilon", &turning, 0.1, &[]);
        let plan = Plan::new(&schedule, PlanOptions::new(TIMES)).unwrap();
        let last = turning.len();
        let formula = |stage: usize| match stage {
            0 => turning[0] - 1,
            k if k == last => TIMES - turning[k - 1] + 1,
            k => turning[k] - turning[k - 1],
        };
        let expected: Vec<usize> = (0..=last).map(formula).collect();
        assert_eq!(plan.calls(), expected, "{turning:?}");
        let pixels: u64 = expected.iter().enumerate().map(|(k, n)| *n as u64 * ((64 * 64) >> (2 * k))).sum();
        assert_eq!(plan.pixel_evaluations(64, 64), pixels, "{turning:?}");
    }
}

#[test]
fn respacing_keeps_every_turning_point() {
    for (class, spacing) in
        [("DDIMScheduler", "trailing"), ("DDPMScheduler", "leading"), ("DPMSolverMultistepScheduler", "linspace")]
    {
        let turning = [123, 360, 721, 999];
        let mut scheduler = fields(json!({"_class_name": class, "timestep_spacing": spacing}));
        scheduler.insert("clip_sample".into(), false.into());
        let decomposition = Decomposition { turning_points: turning.to_vec(), ..Decomposition::default() };
        let schedule = Schedule::new(scheduler, decomposition).unwrap();
        for steps in [10, 11, 25, 137] {
            let plan = Plan::new(&schedule, PlanOptions::new(steps)).unwrap();
            let times: Vec<usize> = plan.steps().iter().map(|step| step.timestep() as usize + 1).collect();
            assert!(times.windows(2).all(|pair| pair[0] > pair[1]), "{times:?}");
            assert!(turning.iter().all(|turning| times.contains(turning)), "{class}, {steps}: {times:?}");
            assert!((steps..=steps + turning.len()).contains(&times.len()));
            for (step, time) in plan.steps().iter().zip(&times) {
                assert_eq!(step.stage, schedule.stage(*time));
                assert_eq!(step.lift.is_some(), turning.contains(time));
                assert_eq!(step.components.len(), turning.len() + 1 - step.stage);
            }
        }
    }
}

#[test]
fn a_schedule_is_the_same_after_writing_and_reading() {
    let text = json!({
        "_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction",
        "turning_points": [360, 720], "attenuation": {"r": 0.1, "q": 2.0}, "lift_std": [0.05, 0.1],
        "stage_class_labels": [1, 2, 3], "stage_sizes": [64, 32, 16], "made_by": "somebody"
    });
    let schedule = Schedule::from_json(text.to_string().as_bytes()).unwrap();
    let written = schedule.to_json();
    assert_eq!(Schedule::from_json(written.as_bytes()).unwrap(), schedule);
    let written: Value = serde_json::from_str(&written).unwrap();
    for (name, value) in text.as_object().unwrap() {
        assert_eq!(written[name], *value, "{name}");
    }
    let ordinary = Schedule::from_json(br#"{"turning_points": [500], "ordinary_models": true}"#).unwrap();
    assert!(ordinary.decomposition().ordinary_models && !schedule.decomposition().ordinary_models);
    assert_eq!(Schedule::from_json(ordinary.to_json().as_bytes()).unwrap(), ordinary);
    let exact = schedule.with_decomposition(Decomposition::default()).unwrap();
    assert!(exact.turning_points().is_empty() && exact.config() == schedule.config());
}

#[test]
fn what_is_wrong_with_a_schedule_is_named() {
    let refused = |changes: Value, status: Status, named: &str| {
        let mut text = fields(json!({"turning_points": [360, 720], "attenuation": {"r": 0.1, "q": 2.0}}));
        text.extend(fields(changes));
        let error = Schedule::from_json(Value::Object(text.clone()).to_string().as_bytes()).unwrap_err();
        assert_eq!(error.status(), status, "{text:?}: {error}");
        assert!(error.message().contains(named), "{text:?}: {error}");
    };
    for (turning, named) in [
        (json!([720, 360]), "720 before 360"),
        (json!([360, 360]), "360 before 360"),
        (json!([1, 360]), "1, must be in 2..=999"),
        (json!([360, 1000]), "1000, must be in 2..=999"),
        (json!([0]), "0, must hold whole numbers above 0"),
        (json!([360.5]), "360.5"),
        (json!("360"), "list"),
        (json!((2..30).collect::<Vec<_>>()), "at most 14"),
    ] {
        refused(json!({"turning_points": turning}), Status::InvalidFile, named);
    }
    for (attenuation, named) in [
        (json!({"r": 0.0}), "r = 0"),
        (json!({"r": 1.1}), "r is 1.1"),
        (json!({"r": -0.5}), "r is -0.5"),
        (json!({"r": "x"}), "r is \"x\""),
        (json!({"q": 0.5}), "q is 0.5"),
        (json!(0.1), "attenuation is 0.1"),
    ] {
        refused(json!({"attenuation": attenuation}), Status::InvalidFile, named);
    }
    refused(json!({"ordinary_models": true}), Status::InvalidFile, "r = 0.1, but ordinary_models");
    refused(json!({"ordinary_models": 1}), Status::InvalidFile, "ordinary_models is 1, must be true or false");
    refused(json!({"lift_std": [0.1]}), Status::InvalidFile, "lift_std has 1 values");
    refused(json!({"lift_std": [0.1, -1.0]}), Status::InvalidFile, "lift_std holds -1");
    refused(json!({"stage_class_labels": [1, 2]}), Status::InvalidFile, "stage_class_labels has 2 values");
    refused(json!({"stage_sizes": [64, 32, 15]}), Status::InvalidFile, "32 before 15");
    refused(json!({"alphas_cumprod": [0.5]}), Status::InvalidFile, "alphas_cumprod has 1 values");
    refused(json!({"num_train_timesteps": 2, "alphas_cumprod": [0.5, 0.6]}), Status::InvalidFile, "0.6");
    refused(json!({"_class_name": "EulerDiscreteScheduler"}), Status::Unsupported, "EulerDiscreteScheduler");
    let karras = json!({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": true});
    refused(karras, Status::Unsupported, "Karras");
    refused(json!({"_class_name": "PNDMScheduler"}), Status::Unsupported, "PNDMScheduler");
    assert_eq!(Schedule::from_json(b"[]").unwrap_err().status(), Status::InvalidFile);
    let one = || Decomposition { turning_points: vec![360], ..Decomposition::default() };
    for not_finite in [
        Decomposition { lift_std: vec![f64::NAN], ..one() },
        Decomposition { attenuation: Attenuation { r: f64::NAN, q: 1.0 }, ..one() },
        Decomposition { attenuation: Attenuation { r: 0.1, q: f64::NAN }, ..one() },
    ] {
        assert!(Schedule::new(Map::new(), not_finite).unwrap_err().message().contains("NaN"));
    }
}

#[test]
fn walks_that_cannot_be_are_refused() {
    let at = |class: &str, turning: &[usize]| schedule(class, "epsilon", turning, 0.1, &[]);
    let refused = |schedule: &Schedule, options: PlanOptions, named: &str| {
        let error = Plan::new(schedule, options).unwrap_err();
        assert!(error.message().contains(named), "{error}");
    };
    refused(&at("DDIMScheduler", &[360, 720]), PlanOptions::new(1), "first turning point, 360");
    refused(&at("DDIMScheduler", &[360]), PlanOptions { start: 26, ..PlanOptions::new(25) }, "start step is 26");
    refused(&at("DDIMScheduler", &[360]), PlanOptions::new(1001), "1..=1000");
    let plan = Plan::new(&at("DDIMScheduler", &[360, 720]), PlanOptions::new(25)).unwrap();
    let error = Trajectory::new(plan.clone(), [1, 3, 64, 66]).unwrap_err();
    assert!(error.message().contains("64 x 66") && error.message().contains("2^2"), "{error}");
    let mut walk = Trajectory::new(plan, [1, 1, 8, 8]).unwrap();
    let mut state = walk.begin(&[0.5; 4], None).unwrap();
    assert!(walk.begin(&[0.5; 64], None).unwrap_err().message().contains("noise has 64 values"));
    while walk.current().is_some_and(|(_, step)| step.lift.is_none()) {
        walk.step(&mut state, &[0.1; 4], None, None).unwrap();
    }
    let error = walk.step(&mut state, &[0.1; 4], None, None).unwrap_err();
    assert!(error.message().contains("lift noise"), "{error}");
    let error = walk.step(&mut state, &[0.1; 4], None, Some(&[0.0; 4])).unwrap_err();
    assert!(error.message().contains("lift noise has 4 values, 16 are needed"), "{error}");
}

#[test]
fn a_schedule_of_another_model_is_told_apart() {
    let cosine = Schedule::from_json(br#"{"beta_schedule": "squaredcos_cap_v2", "turning_points": [360]}"#).unwrap();
    let linear = Schedule::from_json(br#"{"beta_schedule": "linear"}"#).unwrap();
    let shorter =
        Schedule::from_json(br#"{"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 500}"#).unwrap();
    let velocity =
        Schedule::from_json(br#"{"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}"#).unwrap();
    cosine.check_model(cosine.config()).unwrap();
    for (other, named) in [(&linear, "alpha_bar"), (&shorter, "num_train_timesteps"), (&velocity, "prediction_type")] {
        let error = cosine.check_model(other.config()).unwrap_err();
        assert!(error.message().contains(named), "{error}");
    }
}

/// Pictures with components of known mean squares, the finest first.
fn pictures(size: Size, mean_squares: [f64; 3]) -> Vec<f32> {
    let mut components = normal(77, size.elements().unwrap());
    let (fine, middle) = (components.len() / 4 * 3, components.len() / 16 * 15);
    for (at, value) in components.iter_mut().enumerate() {
        let component = usize::from(at >= fine) + usize::from(at >= middle);
        *value = (mean_squares[component].sqrt() * f64::from(*value)) as f32;
    }
    assemble(components, size, 2).unwrap()
}

#[test]
fn turning_points_are_the_earliest_within_the_budget() {
    let size = Size { planes: 12, height: 64, width: 64 };
    let mut statistics = Statistics::new(2).unwrap();
    statistics.add(&pictures(size, [0.05, 0.4, 4.0]), size).unwrap();
    for (component, expected) in [0.05, 0.4, 4.0].into_iter().enumerate() {
        assert!((statistics.mean_square(component) / expected - 1.0).abs() < 0.06, "component {component}");
    }
    let like = schedule("DDPMScheduler", "epsilon", &[], 1.0, &[]);
    for (r, q, most) in [(1.0, 1.0, 1e-3), (0.1, 1.0, 1e-3), (0.1, 2.0, 1e-4), (0.001, 1.0, 1e-4)] {
        let attenuation = Attenuation { r, q };
        let budget = Budget { drop_error: most, attenuation, stage_costs: Vec::new() };
        let choice = choose_turning_points(&like, &statistics, &budget).unwrap();
        let turning = choice.schedule.turning_points().to_vec();
        assert_eq!(turning.len(), 2, "r = {r}");
        for component in 0..2 {
            let c = statistics.mean_square(component);
            assert!((choice.mean_squares[component] - c).abs() < 1e-12);
            assert!((choice.schedule.decomposition().lift_std[component] - c.sqrt()).abs() < 1e-12);
            // The closed form of the divergence, at the lift and a time earlier.
            let bars = linear();
            let error = |turning: usize| {
                let t = turning as f64 - 1.0;
                let (bar, fade) = (bars[turning - 2], r.powf((t / turning as f64).powf(q)));
                bar * fade * fade * c / (2.0 * (1.0 - bar))
            };
            assert!((choice.drop_errors[component] / error(turning[component]) - 1.0).abs() < 1e-9);
            assert!(error(turning[component]) <= most && error(turning[component] - 1) > most, "{turning:?}");
        }
        let plan = Plan::new(&choice.schedule, PlanOptions::new(TIMES)).unwrap();
        let share = plan.pixel_evaluations(64, 64) as f64 / (TIMES * 64 * 64) as f64;
        assert!((choice.cost - share).abs() < 1e-12, "{} is not {share}", choice.cost);
        let svg = choice.to_svg();
        assert!(svg.matches("<polyline").count() == 2 && svg.contains(&format!("dropped at {}", turning[1])), "{svg}");
    }
    // Calls of measured cost: half of a plain walk at 1, half at 0.1.
    let half = schedule("DDPMScheduler", "epsilon", &[501], 1.0, &[]);
    assert!((predicted_cost(&half, &[2.0, 0.2]) - 0.55).abs() < 1e-12);
    // Nothing is dropped where nothing may be lost.
    let strict = Budget { drop_error: 1e-12, attenuation: Attenuation::default(), stage_costs: Vec::new() };
    let choice = choose_turning_points(&like, &statistics, &strict).unwrap();
    assert!(choice.schedule.turning_points().is_empty() && choice.cost == 1.0);
    for (budget, named) in [
        (Budget { drop_error: 0.0, ..strict.clone() }, "budget is 0"),
        (Budget { drop_error: f64::NAN, ..strict.clone() }, "budget is NaN"),
        (Budget { stage_costs: vec![1.0, f64::INFINITY, 1.0], ..strict.clone() }, "cost is inf"),
        (Budget { stage_costs: vec![1.0], ..strict.clone() }, "1 stage costs for 3 stages"),
    ] {
        let error = choose_turning_points(&like, &statistics, &budget).unwrap_err();
        assert!(error.message().contains(named), "{error}");
    }
    assert!(Statistics::new(0).is_err() && Statistics::new(15).is_err());
    assert!(
        choose_turning_points(&like, &Statistics::new(1).unwrap(), &strict)
            .unwrap_err()
            .message()
            .contains("no states")
    );
    let error = statistics.add(&[f32::NAN; 16], Size { planes: 1, height: 4, width: 4 }).unwrap_err();
    assert_eq!(error.status(), Status::NotFinite);
    assert!(statistics.add(&[0.0; 36], Size { planes: 1, height: 6, width: 6 }).is_err());
}
