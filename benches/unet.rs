//! A denoising step, the opening of a model and its memory, beside the same model, untouched, in Python's onnxruntime
//! with as many threads; what it costs to switch concepts, beside a new session; and what a decomposed process saves.
//!
//! Both sides take turns in one run. Prints one JSON object a line: `name`, `value`, `bound`, `note`. The model of Stable
//! Diffusion's size has random weights and is made on the first run; `MACULA_BENCH_SMALL` leaves it out.

mod support;

use std::path::Path;
use std::time::Instant;

use macula::concept::{Composition, GatheredConcept, Indices, Layer, NeuronSet, Projections, Rows};
use macula::diffusion::decomposed::{Plan, Schedule};
use macula::diffusion::schedule::PlanOptions;
use macula::diffusion::unet::{Conditioning, Unet, UnetOptions};
use macula::progress::CancelToken;
use macula::runtime::{Runtime, RuntimeOptions};
use rand_chacha::ChaCha8Rng;
use rand_core::{RngCore, SeedableRng};
use support::{Case, Outcome, Peer, THREADS, figure, median, uniform};

fn main() -> Outcome {
    let arguments: Vec<String> = std::env::args().collect();
    if arguments.get(1).is_some_and(|role| role == "peak") {
        return our_peak();
    }
    let small = Case::small(2);
    let steps = step_ratio(&small, 40)?;
    figure("unet_step_ratio_small", steps, "<= 1.02", "the shipped UNet, batch 2, 64 x 64, median of 40 steps each");
    decomposed(&small, 20, "small")?;
    if support::small_only() {
        return Ok(());
    }
    let large = Case::full_size(2)?;
    let steps = step_ratio(&large, 5)?;
    figure("unet_step_ratio_sd15", steps, "<= 1.02", "batch 2, 64 x 64, 77 tokens, median of 5 steps each");
    decomposed(&large, 3, "sd15")?;
    opening(&large)?;
    memory(&large)
}

/// The untouched model in Python's onnxruntime.
fn peer(case: &Case) -> Outcome<Peer> {
    let mut peer = Peer::start("peer_unet.py")?;
    peer.ask(&format!("open {} {THREADS}", case.model.display()))?;
    peer.ask(&format!("inputs {} {} {} {}", case.batch, case.side, case.side, case.tokens))?;
    Ok(peer)
}

/// Our side: the same model with its keys and values bound.
struct Ours {
    unet: Unet,
    sample: Vec<f32>,
    shape: [usize; 4],
    timestep: f64,
}

impl Ours {
    fn open(case: &Case, cache: Option<&Path>) -> Outcome<Self> {
        let runtime = Runtime::load(&RuntimeOptions::default())?;
        let mut options = UnetOptions::default();
        options.session.intra_threads = THREADS;
        options.session.cache = cache.map(Path::to_owned);
        options.threads = THREADS;
        let mut unet = Unet::open(&runtime, &case.model, &options)?;
        let mut random = ChaCha8Rng::seed_from_u64(0);
        let mut values = |count: usize| (0..count).map(|_| uniform(&mut random)).collect::<Vec<f32>>();
        unet.set_conditioning(&Conditioning {
            batch: case.batch,
            tokens: case.tokens,
            context: values(case.batch * case.tokens * case.features),
            class_labels: case.class_labels.then(|| vec![0; case.batch]),
            ..Conditioning::default()
        })?;
        let shape = [case.batch, case.channels, case.side, case.side];
        Ok(Self { unet, sample: values(shape.iter().product()), shape, timestep: 999.0 })
    }

    fn step(&mut self) -> Outcome<f64> {
        self.step_at(0)
    }

    /// A step on states whose sides are halved `stage` times.
    fn step_at(&mut self, stage: usize) -> Outcome<f64> {
        let [batch, channels, height, width] = self.shape;
        let shape = [batch, channels, height >> stage, width >> stage];
        let sample = &self.sample[..shape.iter().product()];
        let start = Instant::now();
        self.unet.denoise(sample, shape, self.timestep, &CancelToken::new())?;
        self.timestep -= 1.0;
        Ok(start.elapsed().as_secs_f64())
    }
}

/// Our time of a step over the peer's.
fn step_ratio(case: &Case, runs: usize) -> Outcome<f64> {
    let (mut peer, mut ours) = (peer(case)?, Ours::open(case, None)?);
    peer.step()?;
    ours.step()?;
    let (mut theirs, mut mine) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        theirs.push(peer.step()?);
        mine.push(ours.step()?);
    }
    let (mine, theirs) = (median(mine), median(theirs));
    eprintln!("{}: a step takes {:.1} ms, the peer's {:.1} ms", case.model.display(), mine * 1e3, theirs * 1e3);
    Ok(mine / theirs)
}

/// What a decomposed walk takes, as a share of the plain one of as many steps, put together from steps at each stage's size;
/// and the share of the saving of pixels that it saves in time.
fn decomposed(case: &Case, runs: usize, name: &str) -> Outcome {
    let schedule = Schedule::from_json(br#"{"turning_points": [360, 720]}"#)?;
    let plan = Plan::new(&schedule, PlanOptions::new(25))?;
    let calls = plan.calls();
    let mut ours = Ours::open(case, None)?;
    let mut seconds = vec![Vec::new(); calls.len()];
    for run in 0..=runs {
        for (stage, seconds) in seconds.iter_mut().enumerate() {
            let step = ours.step_at(stage)?;
            // The first step at a size takes longer.
            if run > 0 {
                seconds.push(step);
            }
        }
    }
    let seconds: Vec<f64> = seconds.into_iter().map(median).collect();
    let plain = seconds[0] * plan.len() as f64;
    let ratio = calls.iter().zip(&seconds).map(|(calls, seconds)| *calls as f64 * seconds).sum::<f64>() / plain;
    let pixels = plan.pixel_evaluations(case.side, case.side) as f64 / (plan.len() * case.side * case.side) as f64;
    let steps: Vec<String> = seconds.iter().map(|seconds| format!("{:.1} ms", seconds * 1e3)).collect();
    let note = format!("25 steps with turning points 360 and 720; a step takes {}", steps.join(", "));
    figure(&format!("decomposed_time_ratio_{name}"), ratio, "<= 0.6", &note);
    let note = format!("saving in time over saving in pixels, {:.2}", 1.0 - pixels);
    figure(&format!("decomposed_saving_share_{name}"), (1.0 - ratio) / (1.0 - pixels), ">= 0.8", &note);
    Ok(())
}

/// Opening with and without a warm cache, and a switch of concepts against a new session.
fn opening(case: &Case) -> Outcome {
    let cache = tempfile::tempdir_in(support::root().join("target"))?;
    // Seconds of opening and of the first step at sides halved `stage` times. What a step computes no cache can shorten:
    // at 64 x 64 that is most of the time, at 8 x 8 next to nothing, while all weights are still read and packed.
    let first = |cache: Option<&Path>, stage: usize| -> Outcome<(f64, f64, Ours)> {
        let start = Instant::now();
        let mut ours = Ours::open(case, cache)?;
        let opened = start.elapsed().as_secs_f64();
        let step = ours.step_at(stage)?;
        Ok((opened, step, ours))
    };
    drop(first(Some(cache.path()), 0)?);
    let mut session = 0.0;
    for (stage, name, bound) in [(3, "load_cached_ratio_sd15", "<= 0.4"), (0, "load_cached_ratio_sd15_64", "")] {
        let (mut cold, mut warm) = (Vec::new(), Vec::new());
        for _ in 0..3 {
            let (opened, step, _) = first(None, stage)?;
            cold.push((opened, step));
            let (opened, step, _) = first(Some(cache.path()), stage)?;
            warm.push((opened, step));
        }
        let of = |runs: &[(f64, f64)], part: fn(&(f64, f64)) -> f64| median(runs.iter().map(part).collect());
        let (cold_open, warm_open) = (of(&cold, |run| run.0), of(&warm, |run| run.0));
        let (cold_step, warm_step) = (of(&cold, |run| run.1), of(&warm, |run| run.1));
        eprintln!("opening takes {cold_open:.1} s, with a warm cache {warm_open:.1} s");
        eprintln!("the first step takes {cold_step:.1} s, with a warm cache {warm_step:.1} s");
        let (cold, warm) = (of(&cold, |run| run.0 + run.1), of(&warm, |run| run.0 + run.1));
        let side = case.side >> stage;
        let note = format!(
            "open and first step, {side} x {side}, warm cache over none, medians of 3; the step alone {warm_step:.1} s"
        );
        figure(name, warm / cold, bound, &note);
        if stage == 0 {
            let note = "the open alone, warm cache over none, medians of 3";
            figure("open_cached_ratio_sd15", warm_open / cold_open, "<= 0.2", note);
            session = cold;
        }
    }

    let (_, _, mut ours) = first(Some(cache.path()), 0)?;
    let base = ours.unet.projections().ok_or("nothing to compose")?.clone();
    let pool = ours.unet.pool().clone();
    let concepts: Vec<_> = (0..4)
        .map(|seed| GatheredConcept::from_neurons(&neurons(&base, seed)?, &base, &pool).map_err(Into::into))
        .collect::<Outcome<_>>()?;
    let mut swap = f64::INFINITY;
    for run in 0..20 {
        let mut composition = Composition::new();
        // The base every other time, so that each switch really changes something.
        for concept in concepts.iter().filter(|_| run % 2 == 0) {
            composition.push(concept.clone(), 1.0, Rows::All)?;
        }
        let start = Instant::now();
        ours.unet.set_composition(composition)?;
        ours.unet.write_keys_values()?;
        if run % 2 == 0 {
            swap = swap.min(start.elapsed().as_secs_f64());
        }
    }
    let note = "four concepts of 1 % into a live session, over a new session with baked weights";
    figure("swap_vs_session_ratio", swap / session, "<= 0.002", note);
    Ok(())
}

/// A random 1 % of all weights.
fn neurons(base: &Projections, seed: u64) -> Outcome<NeuronSet> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut layers = Vec::new();
    for projection in base.as_slice() {
        let weights = u32::try_from(projection.out_features * projection.in_features)?;
        let members = (0..weights).filter(|_| random.next_u32() < u32::MAX / 100).collect();
        let indices = Indices::from_sorted(weights, members)?;
        layers.push(Layer::new(projection.path.clone(), projection.out_features, projection.in_features, indices)?);
    }
    Ok(NeuronSet::new(layers)?)
}

/// Peak memory of opening and three steps, each side in a fresh process.
fn memory(case: &Case) -> Outcome {
    let mut peer = peer(case)?;
    for _ in 0..3 {
        peer.step()?;
    }
    let theirs = peer.peak()?;
    drop(peer);
    let mine = support::fresh_process(&["peak"])?;
    eprintln!("peak memory {:.2} GB, the peer's {:.2} GB", mine / 1e9, theirs / 1e9);
    figure("rss_ratio_sd15", mine / theirs, "<= 1.1", "peak resident memory of opening and three steps");
    Ok(())
}

fn our_peak() -> Outcome {
    let mut ours = Ours::open(&Case::full_size(2)?, None)?;
    for _ in 0..3 {
        ours.step()?;
    }
    support::print_peak()
}
