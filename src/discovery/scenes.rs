//! Scenes of several subjects, made of pictures of single ones: each subject is cut from its ground, and two to four are put
//! on the ground of one of them, under a prompt that names them in reading order. Cut-mix for diffusion models is SVDiff's
//! (arXiv 2303.11305); cutting out is ours, so that a scene has one ground as a picture has.

use std::ops::Range;

use image::imageops::{FilterType, resize};
use image::{Pixel, Rgb, RgbImage, Rgba, RgbaImage};
use rand_chacha::ChaCha12Rng;
use rand_core::SeedableRng;

use super::draw::{shuffle, unit};
use crate::diffusion::pipeline::{Images, occurrences};
use crate::error::{Error, Result};
use crate::memory::{collected, extend, filled, room};
use crate::progress::Job;

/// The most subjects of a scene.
const MOST: usize = 4;

/// A pixel of the ground is no further from the ground's colour, in any channel.
const LIKE: u8 = 12;

/// Bytes a pixel that cutting out takes, and that putting a scaled subject on a scene does.
const CUTTING: usize = 64;
const RESIZING: usize = 32;

/// An edge pixel as far from the ground's colour is all subject.
const UNLIKE: f32 = 96.0;

/// A subject's side in its cell of a scene.
const SHARE: Range<f64> = 0.8..0.98;

/// Parts of a picture that are smaller than this share of the largest one are specks of its ground.
const SPECK: f64 = 0.01;

/// What the pictures of a scene are drawn from has numbers of its own.
const STREAM: u64 = u64::MAX;

/// Pictures of one subject, and what each shows.
pub(super) struct Shown<'a> {
    pub pictures: &'a Images,
    /// One a picture, each with the trigger.
    pub prompts: &'a [String],
    /// The trigger, and the trigger with the class noun.
    pub words: &'a [String],
}

/// Scenes, what each shows, and of which subjects, in reading order.
pub(super) struct Scenes {
    pub pictures: Images,
    pub prompts: Vec<String>,
    pub members: Vec<Vec<usize>>,
}

/// A subject without its ground.
struct Cutout {
    /// Colours are multiplied by the opacity.
    subject: RgbaImage,
    ground: Rgb<u8>,
}

/// `count` scenes of the size of the pictures. They depend on nothing but the arguments. Reports the stage `"scenes"`.
///
/// Errors: `InvalidArgument` for fewer than two subjects; `OutOfMemory`; `Cancelled`.
pub(super) fn scenes(subjects: &[Shown<'_>], count: usize, seed: u64, job: &mut Job<'_>) -> Result<Scenes> {
    let Some(first) = subjects.first().filter(|_| subjects.len() > 1) else {
        return Err(Error::invalid_argument("a scene needs at least two subjects"));
    };
    let (height, width) = (first.pictures.height, first.pictures.width);
    let cut = subjects.iter().map(|shown| (0..shown.pictures.count).map(|at| Cutout::of(shown.pictures, at)).collect());
    let cut = cut.collect::<Result<Vec<Vec<Cutout>>>>()?;
    let mut random = ChaCha12Rng::seed_from_u64(seed);
    random.set_stream(STREAM);
    let (mut rgb, mut prompts, mut members) = (Vec::new(), Vec::new(), Vec::new());
    let mut order = collected(0..subjects.len())?;
    for scene in 0..count {
        job.step("scenes", scene as u64, count as u64)?;
        shuffle(&mut order, &mut random);
        let number = 2 + below(subjects.len().min(MOST) - 1, &mut random);
        let chosen: Vec<(usize, usize)> =
            order[..number].iter().map(|&member| (member, below(cut[member].len(), &mut random))).collect();
        room(width * height * RESIZING)?;
        let ground = cut[chosen[0].0][chosen[0].1].ground;
        let mut canvas = RgbImage::from_pixel(width as u32, height as u32, ground);
        for (&(member, picture), cell) in chosen.iter().zip(cells(number, width, height)) {
            cut[member][picture].put(&mut canvas, cell, &mut random);
        }
        extend(&mut rgb, canvas.into_raw())?;
        let phrases: Vec<[&str; 3]> = chosen
            .iter()
            .map(|&(member, picture)| phrase(&subjects[member].prompts[picture], subjects[member].words))
            .collect();
        let [before, _, after] = phrases[0];
        let named: Vec<&str> = phrases.iter().map(|[_, phrase, _]| *phrase).collect();
        prompts.push(format!("{before}{}{after}", named.join(" and ")));
        members.push(chosen.iter().map(|(member, _)| *member).collect());
    }
    job.step("scenes", count as u64, count as u64)?;
    Ok(Scenes { pictures: Images { count, height, width, rgb }, prompts, members })
}

/// A prompt in three: what stands before the subject, the subject with its article, what follows.
fn phrase<'p>(prompt: &'p str, words: &[String]) -> [&'p str; 3] {
    let found = words.iter().rev().find_map(|words| occurrences(prompt, words.trim()).into_iter().next());
    let Range { start, end } = found.unwrap_or(0..prompt.len());
    let article = ["a ", "an ", "the ", "A ", "An ", "The "].into_iter().find(|article| {
        let before = prompt[..start].strip_suffix(article);
        before.is_some_and(|before| before.is_empty() || before.ends_with(char::is_whitespace))
    });
    let start = start - article.map_or(0, str::len);
    [&prompt[..start], &prompt[start..end], &prompt[end..]]
}

/// Where `number` subjects may stand, in reading order: left, top, width, height.
fn cells(number: usize, width: usize, height: usize) -> impl Iterator<Item = [f64; 4]> {
    let (columns, rows) = match number {
        2 if height > width => (1, 2),
        2 => (2, 1),
        _ => (2, 2),
    };
    let (wide, high) = (width as f64 / columns as f64, height as f64 / rows as f64);
    (0..number).map(move |at| [(at % columns) as f64 * wide, (at / columns) as f64 * high, wide, high])
}

fn below(count: usize, random: &mut ChaCha12Rng) -> usize {
    ((unit(random) * count as f64) as usize).min(count - 1)
}

/// Column and row.
type Place = (u32, u32);

/// The number of what hangs together with the border and is like the ground.
const OUTSIDE: u32 = 1;

fn places(width: usize, height: usize) -> impl Iterator<Item = Place> {
    (0..height as u32).flat_map(move |y| (0..width as u32).map(move |x| (x, y)))
}

/// To which part of a picture each pixel belongs; 0 where that is not known yet.
struct Parts {
    size: (usize, usize),
    of: Vec<u32>,
}

impl Parts {
    fn at(&self, (x, y): Place) -> u32 {
        self.of[y as usize * self.size.0 + x as usize]
    }

    /// Numbers all pixels that hang together with `from`, have no number and are as wanted; how many these are.
    fn spread(&mut self, from: Place, number: u32, wanted: impl Fn(Place) -> bool) -> usize {
        let (width, height) = self.size;
        let mut take = |place: Place, open: &mut Vec<Place>| {
            let (x, y) = (place.0 as usize, place.1 as usize);
            if x < width && y < height && self.of[y * width + x] == 0 && wanted(place) {
                self.of[y * width + x] = number;
                open.push(place);
            }
        };
        let (mut open, mut count) = (Vec::new(), 0);
        take(from, &mut open);
        while let Some((x, y)) = open.pop() {
            count += 1;
            for next in [(x.wrapping_sub(1), y), (x + 1, y), (x, y.wrapping_sub(1)), (x, y + 1)] {
                take(next, &mut open);
            }
        }
        count
    }
}

impl Cutout {
    /// The part of a picture that is not ground: what is like the colour that most of its border has, and hangs together with
    /// the border, or is a speck on it. A picture without such a ground is taken whole.
    fn of(pictures: &Images, at: usize) -> Result<Self> {
        let (width, height) = (pictures.width, pictures.height);
        room(width * height * CUTTING)?;
        let picture = RgbImage::from_raw(width as u32, height as u32, pictures.picture(at)?.rgb);
        let picture = picture.ok_or_else(|| Error::invalid_argument("a picture has fewer bytes than its size says"))?;
        let (right, bottom) = (width as u32 - 1, height as u32 - 1);
        let rows = (0..=bottom).flat_map(|y| [(0, y), (right, y)]);
        let border = collected((0..=right).flat_map(|x| [(x, 0), (x, bottom)]).chain(rows))?;
        let ground = Rgb([0, 1, 2].map(|channel| {
            let mut values: Vec<u8> = border.iter().map(|&place| picture[place][channel]).collect();
            values.sort_unstable();
            values[values.len() / 2]
        }));
        let apart = |pixel: &Rgb<u8>| (0..3).map(|channel| pixel[channel].abs_diff(ground[channel])).max().unwrap_or(0);
        let mut parts = Parts { size: (width, height), of: filled(width * height, 0)? };
        let like = |place: Place| apart(&picture[place]) <= LIKE;
        border.iter().for_each(|&place| _ = parts.spread(place, OUTSIDE, like));
        let plain = border.iter().filter(|&&place| parts.at(place) == OUTSIDE).count() * 2 >= border.len();
        let mut sizes = Vec::new();
        for place in places(width, height) {
            let number = OUTSIDE + 1 + sizes.len() as u32;
            match parts.spread(place, number, |_| true) {
                0 => {}
                size => sizes.push(size),
            }
        }
        let least = sizes.iter().max().map_or(0.0, |&largest| largest as f64 * SPECK);
        let is_outside = |place: Place| {
            let number = (parts.at(place) - OUTSIDE) as usize;
            number == 0 || (sizes[number - 1] as f64) < least
        };
        let edges =
            places(width, height).filter(|&place| !is_outside(place)).fold(None, |edges: Option<[u32; 4]>, (x, y)| {
                let [left, top, right, bottom] = edges.unwrap_or([x, y, x, y]);
                Some([left.min(x), top.min(y), right.max(x), bottom.max(y)])
            });
        let Some([left, top, right, bottom]) = edges.filter(|_| plain) else {
            let subject = RgbaImage::from_fn(width as u32, height as u32, |x, y| picture[(x, y)].to_rgba());
            return Ok(Self { subject, ground });
        };
        let at_edge = |x: u32, y: u32| {
            let around = (x.saturating_sub(1)..=x + 1).flat_map(|x| (y.saturating_sub(1)..=y + 1).map(move |y| (x, y)));
            around.into_iter().any(|(x, y)| x < width as u32 && y < height as u32 && is_outside((x, y)))
        };
        let subject = RgbaImage::from_fn(right - left + 1, bottom - top + 1, |x, y| {
            let (x, y) = (left + x, top + y);
            let pixel = picture[(x, y)];
            if is_outside((x, y)) {
                return Rgba([0; 4]);
            }
            // An edge pixel is a mixture of ground and subject.
            let opacity = if at_edge(x, y) { (f32::from(apart(&pixel)) / UNLIKE).min(1.0) } else { 1.0 };
            let own = |channel: usize| f32::from(pixel[channel]) - (1.0 - opacity) * f32::from(ground[channel]);
            let [red, green, blue] = [0, 1, 2].map(|channel| own(channel).clamp(0.0, 255.0 * opacity).round() as u8);
            Rgba([red, green, blue, (255.0 * opacity).round() as u8])
        });
        Ok(Self { subject, ground })
    }

    /// Puts the subject somewhere in a cell, as large as it may be there.
    fn put(&self, canvas: &mut RgbImage, [left, top, wide, high]: [f64; 4], random: &mut ChaCha12Rng) {
        let (own_wide, own_high) = (f64::from(self.subject.width()), f64::from(self.subject.height()));
        let share = SHARE.start + unit(random) * (SHARE.end - SHARE.start);
        let scale = share * (wide / own_wide).min(high / own_high);
        let size = |own: f64| ((own * scale).round() as u32).max(1);
        let subject = resize(&self.subject, size(own_wide), size(own_high), FilterType::Triangle);
        let mut place =
            |from: f64, cell: f64, own: u32| (from + unit(random) * (cell - f64::from(own)).max(0.0)) as u32;
        let (x, y) = (place(left, wide, subject.width()), place(top, high, subject.height()));
        for (dx, dy, pixel) in subject.enumerate_pixels() {
            let Some(under) = canvas.get_pixel_mut_checked(x + dx, y + dy) else { continue };
            for channel in 0..3 {
                let ground = u32::from(under[channel]) * u32::from(255 - pixel[3]) / 255;
                under[channel] = (u32::from(pixel[channel]) + ground).min(255) as u8;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLUE: Rgb<u8> = Rgb([20, 40, 200]);
    const RED: Rgb<u8> = Rgb([220, 30, 30]);
    const GREEN: Rgb<u8> = Rgb([30, 200, 60]);

    /// A square of `subject` from `from` to `to` on `ground`, with a hole of the ground's colour in it.
    fn square(subject: Rgb<u8>, ground: Rgb<u8>, [from, to]: [u32; 2]) -> Images {
        let inside = |at: u32| (from..to).contains(&at);
        let hole = |at: u32| at == (from + to) / 2;
        let picture = RgbImage::from_fn(32, 32, |x, y| match (inside(x) && inside(y), hole(x) && hole(y)) {
            (true, false) => subject,
            // A ground that varies a little, as a JPEG file's does.
            _ => Rgb(ground.0.map(|value| value + (x % 5) as u8)),
        });
        Images { count: 1, height: 32, width: 32, rgb: picture.into_raw() }
    }

    #[test]
    fn a_subject_is_cut_from_a_plain_ground_with_what_its_outline_holds() {
        let cut = Cutout::of(&square(RED, BLUE, [8, 20]), 0).unwrap();
        assert_eq!(cut.ground, Rgb([21, 41, 201]));
        assert_eq!(cut.subject.dimensions(), (12, 12));
        assert!(cut.subject.pixels().all(|pixel| pixel[3] == 255));
        assert_eq!(*cut.subject.get_pixel(3, 3), Rgba([220, 30, 30, 255]));
        assert!(cut.subject.get_pixel(6, 6)[2] >= 200, "the hole is part of the subject");
    }

    #[test]
    fn specks_belong_to_the_ground() {
        let mut picture = square(RED, BLUE, [8, 20]);
        picture.rgb[..3].fill(255);
        assert_eq!(Cutout::of(&picture, 0).unwrap().subject.dimensions(), (12, 12));
        let tiny = Images { count: 1, height: 1, width: 1, rgb: vec![7; 3] };
        assert_eq!(Cutout::of(&tiny, 0).unwrap().subject.dimensions(), (1, 1));
    }

    #[test]
    fn a_mixed_edge_gives_its_share_of_the_ground_back() {
        let mut picture = square(Rgb([255; 3]), Rgb([0; 3]), [8, 20]);
        // A column of the left edge is four parts ground and one part subject.
        (8..20).for_each(|y| picture.rgb[(y * 32 + 8) * 3..][..3].fill(48));
        let cut = Cutout::of(&picture, 0).unwrap();
        let edge = cut.subject.get_pixel(0, 5);
        assert!((120..=135).contains(&edge[3]) && edge[0].abs_diff(47) <= 2, "{edge:?}");
    }

    #[test]
    fn a_picture_without_a_plain_ground_is_taken_whole() {
        let noise = (0..32 * 32 * 3).map(|at: u32| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let cut = Cutout::of(&Images { count: 1, height: 32, width: 32, rgb: noise }, 0).unwrap();
        assert_eq!(cut.subject.dimensions(), (32, 32));
        assert!(cut.subject.pixels().all(|pixel| pixel[3] == 255));
    }

    #[test]
    fn prompts_are_split_around_the_subject_and_its_article() {
        let words = ["<s1>".to_owned(), "<s1> animal".to_owned()];
        for (prompt, parts) in [
            ("a <s1> animal on a hill", ["", "a <s1> animal", " on a hill"]),
            ("a photo of the <s1> animal", ["a photo of ", "the <s1> animal", ""]),
            ("pizza <s1> beside a car", ["pizza ", "<s1>", " beside a car"]),
        ] {
            assert_eq!(phrase(prompt, &words), parts);
        }
        // Inside a longer word it does not stand.
        assert_eq!(phrase("a category of Cat", &["cat".to_owned()]), ["a category of ", "Cat", ""]);
    }

    #[test]
    fn scenes_show_each_subject_in_its_cell_on_the_ground_that_the_prompt_tells() {
        let pictures = [square(RED, BLUE, [4, 28]), square(GREEN, Rgb([240; 3]), [10, 20])];
        let prompts = [vec!["a <r> toy on blue".to_owned()], vec!["a <g> toy on white".to_owned()]];
        let words = [["<r>".to_owned()], ["<g>".to_owned()]];
        let shown: Vec<Shown<'_>> =
            (0..2).map(|at| Shown { pictures: &pictures[at], prompts: &prompts[at], words: &words[at] }).collect();
        let made = || scenes(&shown, 20, 7, &mut Job::default());
        let Scenes { pictures, prompts: texts, members } = made().unwrap();
        assert_eq!((pictures.count, texts.len()), (20, 20));
        let mut orders = [0; 2];
        for ((scene, text), members) in pictures.rgb.chunks_exact(32 * 32 * 3).zip(&texts).zip(&members) {
            let share = |columns: Range<usize>, like: Rgb<u8>| {
                let of = |&x: &usize| {
                    let near = |y: usize| (0..3).all(|c| scene[(y * 32 + x) * 3 + c].abs_diff(like[c]) < 30);
                    (0..32).filter(|&y| near(y)).count()
                };
                columns.clone().map(|x| of(&x)).sum::<usize>() as f64 / (columns.len() * 32) as f64
            };
            let red_first = text.find("<r>") < text.find("<g>");
            orders[usize::from(red_first)] += 1;
            assert_eq!(*members, if red_first { [0, 1] } else { [1, 0] });
            let (left, right, ground) = if red_first { (RED, GREEN, BLUE) } else { (GREEN, RED, Rgb([241; 3])) };
            assert!(share(0..16, left) > 0.25 && share(16..32, right) > 0.25, "{text}");
            assert!(share(0..32, ground) > 0.3 && share(0..16, right) == 0.0, "{text}");
        }
        assert!(orders[0] > 3 && orders[1] > 3, "{orders:?}");
        let again = made().unwrap();
        assert_eq!((again.pictures, again.prompts), (pictures, texts));
        assert!(scenes(&shown[..1], 20, 7, &mut Job::default()).is_err());
    }
}
