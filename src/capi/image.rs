//! Pictures
//!
//! Pictures are 8-bit RGB: rows from top to bottom, pixels from left to right, 3 bytes a pixel, no padding.

use std::ffi::c_char;

use super::argument::{out, path, reference, slice};
use super::guard::{guard, guard_free};
use super::handle::{Object, object};
use super::status::macula_status;
use crate::diffusion::pipeline::Images;
use crate::error::{Error, Result};

/// A view of one picture; it does not own the memory.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct macula_image {
    /// `height * width * 3` bytes; not NULL.
    pub rgb: *const u8,
    /// Pixels in a row, >= 1.
    pub width: u32,
    /// Rows, >= 1.
    pub height: u32,
}

impl macula_image {
    /// One picture of several.
    pub(super) fn of(images: &Images, index: usize) -> Result<Self> {
        let size = images.height * images.width * 3;
        let start = index.checked_mul(size).filter(|_| index < images.count);
        let rgb = start.and_then(|start| images.rgb.get(start..start + size)).ok_or_else(|| {
            Error::invalid_argument(format!("index is {index}, but there are {} pictures", images.count))
        })?;
        Ok(Self { rgb: rgb.as_ptr(), width: images.width as u32, height: images.height as u32 })
    }

    /// A copy of the picture.
    ///
    /// # Safety
    /// `rgb` leads to as many bytes as its text says.
    pub(super) unsafe fn read(&self, name: &str) -> Result<Images> {
        let (width, height) = (self.width as usize, self.height as usize);
        let size = width.checked_mul(height).and_then(|area| area.checked_mul(3)).filter(|&size| size > 0);
        let size = size.ok_or_else(|| Error::invalid_argument(format!("{name} has {width} x {height} pixels")))?;
        // SAFETY: as promised by the caller.
        let bytes = unsafe { slice(self.rgb, size, &format!("{name}.rgb")) }?;
        let mut rgb = Vec::new();
        rgb.try_reserve_exact(size)?;
        rgb.extend_from_slice(bytes);
        Ok(Images { count: 1, height, width, rgb })
    }
}

/// Pictures that a draw made or a file held, all of one size. They never change, so any number of threads may read them.
pub struct macula_images {
    pub(super) images: Images,
}
object!(macula_images, 5);

/// Reads a PNG, JPEG or WebP file as one picture of a given size: turned upright as its EXIF data says, cropped around its
/// centre to the wanted proportions, and scaled. Transparent places become white.
///
/// - `file`: path; not NULL.
/// - `width`: pixels in a row of the result, 1 to 16,384.
/// - `height`: rows of the result, likewise.
/// - `out_images`: receives the picture; not NULL. Free it with `macula_images_free`.
///
/// Errors: `INVALID_ARGUMENT` for the size; `NOT_FOUND`, `IO`; `INVALID_FILE` for what is no such picture;
/// `LIMIT_EXCEEDED` for one of more than 2^28 pixels. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_images_read(
    file: *const c_char,
    width: u32,
    height: u32,
    out_images: *mut *mut macula_images,
) -> macula_status {
    guard("macula_images_read", |_| {
        // SAFETY: valid as the header asks.
        let (file, out_images) = unsafe { (path(file, "file")?, out(out_images, "out_images")?) };
        let images = Images::read(file, width as usize, height as usize)?;
        out_images.set(macula_images::table().insert(macula_images { images }));
        Ok(())
    })
}

/// How many pictures there are.
///
/// - `images`: live pictures; not NULL.
/// - `out_count`: receives the number; not NULL.
///
/// Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_images_count(images: *const macula_images, out_count: *mut usize) -> macula_status {
    guard("macula_images_count", |call| {
        let images = call.object(images, "images")?;
        // SAFETY: valid as the header asks.
        unsafe { out(out_count, "out_count") }?.set(images.images.count);
        Ok(())
    })
}

/// One picture.
///
/// - `images`: live pictures; not NULL.
/// - `index`: below their number.
/// - `out_image`: receives a view that stays until the pictures are freed; not NULL.
///
/// Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_images_get(
    images: *const macula_images,
    index: usize,
    out_image: *mut macula_image,
) -> macula_status {
    guard("macula_images_get", |call| {
        let images = call.object(images, "images")?;
        // SAFETY: valid as the header asks.
        unsafe { out(out_image, "out_image") }?.set(macula_image::of(&images.images, index)?);
        Ok(())
    })
}

/// Writes one picture as a PNG file: to a temporary file beside it, then renamed.
///
/// - `images`: live pictures; not NULL.
/// - `index`: below their number.
/// - `file`: path; not NULL.
///
/// Errors: `NOT_FOUND` if the folder is missing, `IO`. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_images_write_png(
    images: *const macula_images,
    index: usize,
    file: *const c_char,
) -> macula_status {
    guard("macula_images_write_png", |call| {
        let images = call.object(images, "images")?;
        // SAFETY: valid as the header asks.
        images.images.write_png(index, unsafe { path(file, "file") }?)
    })
}

/// Frees pictures; views of them end.
///
/// - `images`: live pictures; may be NULL, then nothing happens.
///
/// Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_images_free(images: *mut macula_images) -> macula_status {
    guard_free("macula_images_free", images)
}

/// Writes any RGB picture as a PNG file: to a temporary file beside it, then renamed.
///
/// - `image`: the picture; not NULL.
/// - `file`: path; not NULL.
///
/// Errors: `NOT_FOUND` if the folder is missing, `IO`. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_image_write_png(image: *const macula_image, file: *const c_char) -> macula_status {
    guard("macula_image_write_png", |_| {
        // SAFETY: valid as the header asks.
        let (image, file) = unsafe { (reference(image, "image")?, path(file, "file")?) };
        // SAFETY: as above.
        unsafe { image.read("image") }?.write_png(0, file)
    })
}
