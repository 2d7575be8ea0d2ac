//! Pipelines of model folders against diffusers: every latent and every image of small models with random weights.

mod support;

use std::ops::ControlFlow;

use macula::diffusion::guidance::{Guidance, StepReport};
use macula::diffusion::pipeline::{DrawOptions, Images, Pipeline, Start};
use macula::diffusion::schedule::Sampler;
use macula::diffusion::unet::UnetOptions;
use macula::progress::Job;
use macula::runtime::{Runtime, RuntimeOptions};
use serde_json::Value;

fn runtime() -> Runtime {
    support::onnxruntime();
    Runtime::load(&RuntimeOptions::default()).unwrap()
}

fn options() -> UnetOptions {
    let mut options = UnetOptions::default();
    options.session.intra_threads = 1;
    options.threads = 1;
    options
}

fn words(value: &Value) -> Vec<String> {
    match value {
        Value::Array(words) => words.iter().map(|word| word.as_str().unwrap().to_owned()).collect(),
        word => vec![word.as_str().unwrap().to_owned()],
    }
}

fn pair(value: &Value) -> Option<(usize, usize)> {
    Some((value.get(0)?.as_u64()? as usize, value.get(1)?.as_u64()? as usize))
}

/// Draws everything that `pipelines.py` drew, and compares each state and the images.
fn agrees_with_diffusers(kind: &str) {
    let folder = support::fixture("pipelines.py", &[kind]);
    let draws: Value = serde_json::from_slice(&std::fs::read(folder.join("draws.json")).unwrap()).unwrap();
    let values = support::read_f32(folder.join("values.f32"));
    let part = |place: &Value| {
        let shape: Vec<usize> =
            place["shape"].as_array().unwrap().iter().map(|size| size.as_u64().unwrap() as usize).collect();
        let offset = place["offset"].as_u64().unwrap() as usize;
        (values[offset..offset + shape.iter().product::<usize>()].to_vec(), shape)
    };
    let mut pipeline = Pipeline::open(&runtime(), folder.join("model"), &options()).unwrap();
    for (number, case) in draws.as_array().unwrap().iter().enumerate() {
        let given = &case["options"];
        let (noise, shape) = part(&case["noise"]);
        let (states, _) = part(&case["states"]);
        let (images, image_shape) = part(&case["images"]);
        let mut draw = DrawOptions::new("");
        draw.prompts = words(&given["prompt"]);
        draw.negative_prompt = given.get("negative_prompt").map(|negative| words(negative)[0].clone());
        draw.steps = given["num_inference_steps"].as_u64().unwrap() as usize;
        draw.guidance = Guidance {
            scale: given["guidance_scale"].as_f64().unwrap(),
            rescale: given["guidance_rescale"].as_f64().unwrap_or(0.0),
        };
        draw.sampler = Some(Sampler::from_class_name(case["sampler"].as_str().unwrap()).unwrap());
        draw.height = Some(image_shape[1]);
        draw.width = Some(image_shape[2]);
        draw.noise = Some(&noise);
        draw.original_size = pair(&given["original_size"]);
        draw.target_size = pair(&given["target_size"]);
        draw.crop = pair(&given["crops_coords_top_left"]).unwrap_or((0, 0));
        let latents = case.get("latents").map(|place| part(place).0);
        let step = case["first_step"].as_u64().unwrap_or(0) as usize;
        let picture = case.get("picture").map(|place| {
            let (pixels, shape) = part(place);
            Images {
                count: shape[0],
                height: shape[1],
                width: shape[2],
                rgb: pixels.iter().map(|p| *p as u8).collect(),
            }
        });
        if let Some(images) = &picture {
            draw.start = Start::Images { images, step };
        }
        let mut worst = 0.0_f64;
        let mut reports = 0;
        let mut on_step = |report: &StepReport<'_>| {
            assert_eq!(report.shape.to_vec(), shape);
            let error = support::relative_error(report.state, &states[reports * noise.len()..][..noise.len()]);
            assert!(error < 1e-4, "{kind} draw {number}: state after step {} differs by {error:e}", report.step);
            worst = worst.max(error);
            reports += 1;
            ControlFlow::Continue(())
        };
        let drawn = pipeline.draw(&draw, Some(&mut on_step), &mut Job::default()).unwrap();
        assert_eq!(reports * noise.len(), states.len());
        assert_eq!([drawn.count, drawn.height, drawn.width], image_shape[..3]);
        let far = drawn
            .rgb
            .iter()
            .zip(&images)
            .map(|(ours, theirs)| (f64::from(*ours) - f64::from(*theirs) * 255.0).abs())
            .fold(0.0, f64::max);
        assert!(far < 0.75, "{kind} draw {number}: a pixel is {far} of 255 away from an unrounded one");
        println!("{kind} draw {number}: worst state {worst:.1e}, worst pixel {far:.3} of 255 (0.5 is rounding)");
        if let Some(values) = &latents {
            draw.start = Start::Latents { values, step };
            let (ours, _) = pipeline.draw_latents(&draw, None, &mut Job::default()).unwrap();
            let error = support::relative_error(&ours, &states[states.len() - noise.len()..]);
            assert!(error < 1e-4, "{kind} draw {number}: from torch's encoding of the picture: {error:e}");
        }
    }
}

#[test]
fn stable_diffusion_1_agrees_with_diffusers() {
    agrees_with_diffusers("sd1");
}

#[test]
fn stable_diffusion_2_agrees_with_diffusers() {
    agrees_with_diffusers("sd2");
}

#[test]
fn stable_diffusion_xl_agrees_with_diffusers() {
    agrees_with_diffusers("sdxl");
}

#[test]
fn a_unet_that_embeds_its_guidance_agrees_with_diffusers() {
    agrees_with_diffusers("lcm");
}

#[test]
fn a_pixel_space_model_agrees_with_diffusers() {
    agrees_with_diffusers("pixel");
}
