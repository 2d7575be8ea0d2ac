//! The plug-in for GIMP, in a real GIMP: called by a script without a screen, and used by hand in its dialog. The layers
//! that it makes are held against what the library draws.
#![allow(clippy::unwrap_used)]

#[path = "support/c.rs"]
mod c;
#[path = "support/install.rs"]
mod install;
#[path = "support/screen.rs"]
mod screen;
mod support;

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use image::RgbImage;
use install::text;
use screen::{Screen, drawn, wait_for};

const TITLE: &str = "^Draw with Macula$";
const PROMPT: &str = "a <s1> apple and a tiger on a blue background";

/// A folder with the library and, as GIMP's own folder of a user, with the plug-in.
static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = install::empty_folder("gimp");
    install::install(&folder.join("installed"));
    let plugins = folder.join("gimp/plug-ins");
    std::fs::create_dir_all(&plugins).unwrap();
    let mut make = Command::new("make");
    make.arg("-C").arg(root().join("examples/gimp")).args(["install", "CFLAGS=-O1 -Werror"]);
    make.arg(format!("OUT={}", folder.display())).arg(format!("PLUGINS={}", plugins.display()));
    c::succeed(make.env("PKG_CONFIG_PATH", folder.join("installed/lib/pkgconfig")));
    // The other plug-ins that the scripts below call, and no more: GIMP asks each what it does before it starts.
    let output = c::succeed(Command::new("pkg-config").args(["--variable=gimplibdir", "gimp-2.0"]));
    let system = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim()).join("plug-ins");
    for name in ["script-fu", "file-png"] {
        symlink(system.join(name), plugins.join(name)).unwrap();
    }
    std::fs::write(folder.join("gimp/gimprc"), "(plug-in-path \"${gimp_dir}/plug-ins\")\n(theme \"System\")\n")
        .unwrap();
    folder
});

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn model() -> PathBuf {
    root().join("models/emoji/onnx")
}

fn concept(name: &str) -> PathBuf {
    root().join("models/concepts").join(name).with_extension("safetensors")
}

fn is_missing(test: &str) -> bool {
    let programs = [
        ("gimp-console-2.10", "gimp"),
        ("gimp-2.10", "gimp"),
        ("make", "make"),
        ("Xvfb", "xvfb"),
        ("xdotool", "xdotool"),
    ];
    screen::lacks(test, &programs, &[("gimpui-2.0", "libgimp2.0-dev")])
}

/// Adds what a GIMP needs that runs `scripts` and then quits. The plug-in finds the ONNX Runtime that was installed with it.
fn gimp(mut command: Command, own: &str, scripts: &[String]) -> Command {
    let folder = FOLDER.join(own);
    c::succeed(Command::new("cp").arg("-a").arg(FOLDER.join("gimp")).arg(&folder));
    command.env("GIMP2_DIRECTORY", &folder).env("HOME", &*FOLDER).env_remove("MACULA_ONNXRUNTIME");
    command.args(["--no-data", "--no-fonts", "--no-splash", "--new-instance"]);
    for script in scripts {
        command.args(["--batch", script]);
    }
    command.args(["--batch", "(gimp-quit 1)"]);
    command
}

/// A call of the plug-in without a dialog.
fn call(image: &str, model: &Path, concepts: &[(PathBuf, f64)], steps: u32) -> String {
    let files: Vec<String> = concepts.iter().map(|(file, _)| format!("{:?}", text(file))).collect();
    let strengths: Vec<String> = concepts.iter().map(|(_, strength)| format!("{strength:.2}")).collect();
    let count = concepts.len();
    let lists = format!("{count} '({}) {count} #({})", files.join(" "), strengths.join(" "));
    format!("(macula-draw RUN-NONINTERACTIVE {image} -1 {:?} {PROMPT:?} {lists} {steps} 4.0 7)", text(model))
}

/// Saves a layer.
fn save(image: &str, layer: &str, file: &Path) -> String {
    format!("(file-png-save RUN-NONINTERACTIVE {image} {layer} {file:?} {file:?} 0 9 0 0 0 0 0)", file = text(file))
}

fn read(file: &Path) -> RgbImage {
    image::open(file).unwrap().into_rgb8()
}

#[test]
fn scripts_draw_images_and_layers() {
    if is_missing("the GIMP plug-in without a dialog") {
        return;
    }
    let (new, layer) = (FOLDER.join("new.png"), FOLDER.join("layer.png"));
    let two = [(concept("green-apple"), 0.75), (concept("erase-tiger"), 1.0)];
    let scripts = [
        format!(
            "(let ((made {})) {} (gimp-image-delete (car made)))",
            call("-1", &model(), &two, 6),
            save("(car made)", "(cadr made)", &new)
        ),
        // Into an image of another size: the layer keeps its own, in the middle, above the one that was there.
        format!(
            "(let* ((image (car (gimp-image-new 100 80 RGB))) (below (car (gimp-layer-new image 100 80 RGB-IMAGE \"below\" \
             100 LAYER-MODE-NORMAL)))) (gimp-image-insert-layer image below 0 0) (let* ((made {}) (layer (cadr made)) \
             (at (gimp-drawable-offsets layer))) (gimp-message (string-append \"layer at \" (number->string (car at)) \" \" \
             (number->string (cadr at)) \" position \" (number->string (car (gimp-image-get-item-position image layer))) \
             (if (= image (car made)) \" same \" \" other \") (car (gimp-item-get-name layer)))) {}) \
             (gimp-image-delete image))",
            call("image", &model(), &[], 2),
            save("image", "layer", &layer)
        ),
    ];
    let output = c::succeed(gimp(Command::new("gimp-console-2.10"), "headless", &scripts).arg("--no-interface"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains(&format!("layer at 18 8 position 0 same {PROMPT}")), "{said}");
    assert!(read(&new) == drawn(PROMPT, 6, 4.0, 7, &two), "the new image is not what the library draws");
    assert!(read(&layer) == drawn(PROMPT, 2, 4.0, 7, &[]), "the new layer is not what the library draws");
}

#[test]
fn mistakes_are_messages_of_gimp() {
    if is_missing("the GIMP plug-in's errors") {
        return;
    }
    let broken = FOLDER.join("broken.safetensors");
    std::fs::write(&broken, "no concept").unwrap();
    let after = FOLDER.join("after.png");
    let too_strong = [(concept("green-apple"), 1.5)];
    let scripts = [
        call("-1", Path::new("/no/such/model"), &[], 2),
        call("-1", &model(), &[(broken.clone(), 1.0)], 2),
        call("-1", &model(), &[(FOLDER.join("absent.safetensors"), 1.0)], 2),
        call("-1", &model(), &too_strong, 2),
        call("-1", &model(), &[], 0),
        call("-1", &model(), &[], 2).replace("#()", "#(1.0)").replace("0 #(", "1 #("),
        call("-1", &model(), &[], 2).replace(&format!("{PROMPT:?}"), "(make-string 1024 #\\a)"),
        format!("(let ((made {})) {})", call("-1", &model(), &[], 2), save("(car made)", "(cadr made)", &after)),
    ];
    let output = c::succeed(gimp(Command::new("gimp-console-2.10"), "mistakes", &scripts).arg("--no-interface"));
    let said = String::from_utf8_lossy(&output.stderr);
    let failed: Vec<&str> = said.lines().filter(|line| line.contains("rocedure execution of macula-draw")).collect();
    let expected = [
        "/no/such/model",
        "broken.safetensors",
        "absent.safetensors",
        "strength",
        "steps must be at least 1",
        "num-strengths the same",
        "prompt must be a text of less than 1024 bytes",
    ];
    assert_eq!(failed.len(), expected.len(), "{said}");
    for (line, words) in failed.iter().zip(expected) {
        assert!(line.contains(words), "{line} does not say {words}");
    }
    assert!(read(&after) == drawn(PROMPT, 2, 4.0, 7, &[]), "after the mistakes it does not draw as before");
}

/// GIMP with its windows, and the plug-in's dialog on top.
struct Dialog {
    screen: Screen,
    gimp: Child,
}

impl Dialog {
    /// Opens the dialog, with the settings of a draw before it, as GIMP keeps them.
    fn open(scripts: &[String]) -> Self {
        let screen = Screen::start(1280, 800);
        let mut command = gimp(screen.command("gimp-2.10"), "dialog", scripts);
        let gimp = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        Self { screen, gimp }
    }

    /// The number of a window, if it is there.
    fn window(&self, name: &str) -> Option<String> {
        let output = self.screen.command("xdotool").args(["search", "--name", name]).output().unwrap();
        String::from_utf8(output.stdout).unwrap().lines().last().map(str::to_owned)
    }

    fn prompt(&self, prompt: &str) {
        self.keys(&["alt+p", "ctrl+a"]);
        self.screen.type_text(prompt);
    }

    fn steps(&self, steps: &str) {
        self.keys(&["alt+s", "ctrl+a"]);
        self.screen.type_text(steps);
    }

    fn keys(&self, keys: &[&str]) {
        keys.iter().for_each(|key| drop(self.screen.act(&["key", key, "sleep", "0.05"])));
    }

    /// Whether the preview shows colours; all else in the dialog is grey.
    fn previews(&self, window: &str) -> bool {
        let geometry = self.screen.act(&["getwindowgeometry", "--shell", window]);
        let of =
            |name: &str| geometry.lines().find_map(|line| line.strip_prefix(name)).unwrap().parse::<u32>().unwrap();
        let (x, y, width) = (of("X="), of("Y="), of("WIDTH="));
        let picture = self.screen.picture();
        let grey = |[r, g, b]: [u8; 3]| r.max(g).max(b) - r.min(g).min(b) < 40;
        let right = (x + width - 200..x + width).flat_map(|x| (y..y + 200).map(move |y| (x, y)));
        right.filter(|&(x, y)| !grey(picture.get_pixel(x, y).0)).count() > 2000
    }
}

impl Drop for Dialog {
    fn drop(&mut self) {
        let _ = self.gimp.kill();
        let _ = self.gimp.wait();
    }
}

#[test]
fn the_dialog_draws_cancels_and_gives_a_layer() {
    if is_missing("the GIMP plug-in's dialog") {
        return;
    }
    let file = FOLDER.join("dialog.png");
    let apple = [(concept("green-apple"), 1.0)];
    let mut dialog = Dialog::open(&[
        call("-1", &model(), &apple, 2),
        format!(
            "(let ((made (macula-draw RUN-INTERACTIVE 1 2 \"\" \"\" 0 '() 0 #() 1 1 1))) {})",
            save("1", "(cadr made)", &file)
        ),
    ]);
    // Three GIMPs start at once, each asking all its plug-ins what they are.
    let window = wait_for("dialog", 120, || dialog.window(TITLE));
    dialog.screen.focus(&window);
    // The concept's word is not in this prompt, which GIMP says in a window of its own; the dialog stays.
    dialog.prompt("a cat");
    dialog.keys(&["alt+d"]);
    let message = wait_for("message", 20, || dialog.window("^GIMP Message$"));
    dialog.screen.focus(&message);
    dialog.keys(&["Return"]);
    wait_for("end of the message", 10, || dialog.window("^GIMP Message$").is_none().then_some(()));
    dialog.screen.focus(&window);
    // A long draw, which Cancel ends; the dialog stays.
    let prompt = "a <s1> apple on a green background";
    dialog.prompt(prompt);
    dialog.steps("99");
    assert!(!dialog.previews(&window));
    dialog.keys(&["alt+d"]);
    wait_for("preview", 30, || dialog.previews(&window).then_some(()));
    dialog.keys(&["alt+c"]);
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(dialog.window(TITLE).as_ref(), Some(&window), "Cancel closed the dialog");
    assert!(!file.exists(), "a cancelled drawing gave a layer");
    // Draw can't be pressed until the other drawing has stopped.
    let ended = (0..12).find_map(|_| {
        dialog.steps("6");
        dialog.keys(&["alt+d"]);
        let end = Instant::now() + Duration::from_secs(5);
        while Instant::now() < end && dialog.gimp.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(50));
        }
        dialog.gimp.try_wait().unwrap()
    });
    let ended = ended.expect("GIMP ends when the dialog has given its picture");
    assert!(ended.success(), "{ended}");
    assert!(read(&file) == drawn(prompt, 6, 4.0, 7, &apple), "the layer is not what the library draws");
}
