//! The gradient of a loss with respect to every cross-attention key and value weight, beside PyTorch's forward and
//! backward pass with as many threads, and a whole search beside the PyTorch reference.
//!
//! Both sides take turns in one run. Prints one JSON object a line: `name`, `value`, `bound`, `note`. The model of Stable
//! Diffusion's size has random weights and is made on the first run; `MACULA_BENCH_SMALL` leaves it out.

mod support;

use std::time::Instant;

use macula::diffusion::pipeline::{Images, Pipeline};
use macula::diffusion::unet::{Conditioning, UnetOptions};
use macula::discovery::{Batch, Goal, GradientOptions, KeyValueGradient, Request, Subject};
use macula::onnx::grad::{Effort, Spending};
use macula::progress::{CancelToken, Job};
use macula::runtime::{Runtime, RuntimeOptions};
use rand_chacha::ChaCha8Rng;
use rand_core::SeedableRng;
use support::{Case, Outcome, Peer, THREADS, figure, median, uniform};

/// Bytes of the forward pass that the gradient may keep where the rest is computed again.
const FEW_ACTIVATIONS: u64 = 256 << 20;

fn main() -> Outcome {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, role, effort, activations] = arguments.as_slice()
        && role == "peak"
    {
        let case = Case::full_size(1)?;
        let effort = if effort == "memory" { Effort::Memory } else { Effort::Speed };
        let (gradient, batch, _) = open(&case, Spending { effort, activations: activations.parse().ok() })?;
        step(&gradient, &case, &batch)?;
        return support::print_peak();
    }
    let small = Case::small(8);
    let mut peer = peer("small", &small)?;
    for (effort, name) in [(Effort::Speed, "grad_time_ratio_small"), (Effort::Memory, "grad_time_ratio_small_memory")] {
        let bound = if effort == Effort::Speed { "<= 0.6" } else { "" };
        let note = "the shipped UNet, batch 8, 64 x 64, over PyTorch's forward and backward, medians of 10";
        figure(name, ratio(&small, effort.into(), &mut peer, 10)?, bound, note);
    }
    whole_search(&mut peer)?;
    drop(peer);
    if support::small_only() {
        return Ok(());
    }
    large(&Case::full_size(1)?)
}

fn peer(which: &str, case: &Case) -> Outcome<Peer> {
    let mut peer = Peer::start("peer_gradient.py")?;
    peer.ask(&format!("open {which} {THREADS}"))?;
    peer.ask(&format!("inputs {} {} {}", case.batch, case.side, case.tokens))?;
    Ok(peer)
}

/// A gradient that is ready to run, its batch, and the seconds that it took to open it.
fn open(case: &Case, spending: Spending) -> Outcome<(KeyValueGradient, Batch, f64)> {
    let mut random = ChaCha8Rng::seed_from_u64(0);
    let mut values = |count: usize| (0..count).map(|_| uniform(&mut random)).collect::<Vec<f32>>();
    let state = case.batch * case.channels * case.side * case.side;
    let batch = Batch {
        states: values(state),
        timesteps: vec![500; case.batch],
        targets: values(state),
        weights: vec![1.0 / case.batch as f32; case.batch],
        conditioning: Conditioning {
            batch: case.batch,
            tokens: case.tokens,
            context: values(case.batch * case.tokens * case.features),
            class_labels: case.class_labels.then(|| vec![0; case.batch]),
            ..Conditioning::default()
        },
        rows: (0..case.batch * case.tokens).map(Into::into).collect(),
    };
    let runtime = Runtime::load(&RuntimeOptions::default())?;
    let mut options = GradientOptions { spending, threads: THREADS, ..GradientOptions::default() };
    options.session.intra_threads = THREADS;
    let shape = [case.channels, case.side, case.side];
    let start = Instant::now();
    let gradient = KeyValueGradient::open(&runtime, &case.model, &batch, shape, &options, &CancelToken::new())?;
    Ok((gradient, batch, start.elapsed().as_secs_f64()))
}

fn step(gradient: &KeyValueGradient, case: &Case, batch: &Batch) -> Outcome<f64> {
    let scales = vec![1.0; gradient.len()];
    let start = Instant::now();
    gradient.slope(batch, [case.channels, case.side, case.side], &scales, &CancelToken::new())?;
    Ok(start.elapsed().as_secs_f64())
}

/// Our time of a loss and its gradient over the peer's.
fn ratio(case: &Case, spending: Spending, peer: &mut Peer, runs: usize) -> Outcome<f64> {
    let (gradient, batch, opened) = open(case, spending)?;
    peer.step()?;
    step(&gradient, case, &batch)?;
    let (mut theirs, mut mine) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        theirs.push(peer.step()?);
        mine.push(step(&gradient, case, &batch)?);
    }
    let (mine, theirs) = (median(mine), median(theirs));
    let kept = gradient.activations() as f64 / 1e6;
    eprintln!(
        "{spending:?}: made in {opened:.1} s, keeps {kept:.0} MB; a gradient takes {mine:.2} s, the peer's {theirs:.2} s"
    );
    Ok(mine / theirs)
}

/// A search for a subject in the shipped model: pictures read, differentiated, 40 batches of 8 at 32 x 32, a learnt mask.
fn whole_search(peer: &mut Peer) -> Outcome {
    const BATCHES: usize = 40;
    let models = support::root().join("models/emoji");
    let runtime = Runtime::load(&RuntimeOptions::default())?;
    let mut options = UnetOptions::default();
    (options.threads, options.session.intra_threads) = (THREADS, THREADS);
    let mut pipeline = Pipeline::open(&runtime, models.join("onnx"), &options)?;
    let mut ours = || -> Outcome<f64> {
        let start = Instant::now();
        let mut pictures = Images { count: 0, height: 32, width: 32, rgb: Vec::new() };
        for number in 1..=4 {
            let picture = Images::read(models.join(format!("subjects/octopus/{number}.png")), 32, 32)?;
            pictures.count += 1;
            pictures.rgb.extend(picture.rgb);
        }
        let subject = Subject {
            pictures: &pictures,
            prompts: Vec::new(),
            trigger: "<s1>".into(),
            class_noun: "animal".into(),
            class_pictures: None,
        };
        let mut request = Request::new(Goal::Implant(subject));
        (request.batches, request.class_label) = (BATCHES, 4);
        request.find(&mut pipeline, &mut Job::default())?;
        Ok(start.elapsed().as_secs_f64())
    };
    let (mut mine, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        theirs.push(peer.ask(&format!("search octopus 32 {BATCHES} 8"))?["seconds"].as_f64().ok_or("no time")?);
        mine.push(ours()?);
    }
    let (mine, theirs) = (median(mine), median(theirs));
    eprintln!("a search takes {mine:.1} s, the reference's {theirs:.1} s");
    let note = "a subject's neurons in the shipped model, pictures to set, over the PyTorch reference, medians of 3";
    figure("discover_ratio", mine / theirs, "<= 0.6", note);
    Ok(())
}

fn large(case: &Case) -> Outcome {
    let mut peer = peer("sd15", case)?;
    let note = "batch 1, 64 x 64, 77 tokens, over PyTorch's forward and backward, medians of 3";
    figure("grad_time_ratio_sd15", ratio(case, Effort::Speed.into(), &mut peer, 3)?, "<= 0.75", note);
    figure("grad_time_ratio_sd15_memory", ratio(case, Effort::Memory.into(), &mut peer, 3)?, "<= 1.0", note);
    let least = Spending { effort: Effort::Memory, activations: Some(FEW_ACTIVATIONS) };
    figure("grad_time_ratio_sd15_recompute", ratio(case, least, &mut peer, 3)?, "", note);
    let theirs = peer.peak()?;
    drop(peer);
    let few = FEW_ACTIVATIONS.to_string();
    for (effort, activations, name, bound) in [
        ("memory", "all", "grad_rss_ratio_sd15", "<= 1.0"),
        ("memory", &few, "grad_rss_ratio_sd15_recompute", ""),
        ("speed", "all", "grad_rss_ratio_sd15_speed", ""),
    ] {
        let mine = support::fresh_process(&["peak", effort, activations])?;
        eprintln!("{effort}, {activations} kept: {:.2} GB, the peer's {:.2} GB", mine / 1e9, theirs / 1e9);
        figure(name, mine / theirs, bound, "peak resident memory of opening and one gradient, over PyTorch's");
    }
    Ok(())
}
