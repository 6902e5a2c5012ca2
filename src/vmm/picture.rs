//! The thread `memory-picture`, which draws the memory of the running machine (`--memory-picture FILE`).
//!
//! `signals` and the end of the machine order a picture. The thread may wait for the locks of all devices,
//! and for a disk.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::error::{VmmError, failed_to};
use super::memory_map::MemoryMap;
use super::writer::Writer;
use crate::picture::memory::draw;
use crate::report::create;
use crate::sandbox::vmm::Kind;
use crate::thread;

/// How long the end of the machine waits for the last picture.
const LAST_PICTURE: Duration = Duration::from_secs(1);

/// The file for the picture of a running machine.
pub(super) struct PictureFile {
    path: PathBuf,
    file: File,
}

impl PictureFile {
    /// Creates or empties it. Refuses what cannot be written anew, such as a pipe.
    pub fn create(path: &Path) -> Result<PictureFile, VmmError> {
        let failed = |error| VmmError::PictureFile(path.to_owned(), error);
        if path.metadata().is_ok_and(|metadata| !metadata.is_file()) {
            return Err(failed(io::Error::other("it is not a regular file, which each picture needs anew")));
        }
        Ok(PictureFile { path: path.to_owned(), file: create(path).map_err(failed)? })
    }

    /// Starts the thread.
    pub fn start(self, map: Arc<MemoryMap>) -> Result<Arc<Writer>, VmmError> {
        let painter = Arc::<Writer>::default();
        let orders = Arc::clone(&painter);
        thread::spawn("memory-picture".into(), Kind::Painter, move || orders.serve(|| self.write(&map)))
            .map_err(failed_to("start the thread for the memory picture"))?;
        Ok(painter)
    }

    fn write(&self, map: &MemoryMap) {
        let picture = draw("Guest physical memory of a running machine", map.parts(), None);
        let empty = || self.file.set_len(0);
        if let Err(error) = empty().and_then(|()| self.file.write_all_at(picture.as_bytes(), 0)) {
            log::warn!("cannot write the memory picture {}: {error}", self.path.display());
            // An empty file is better than a part of a picture.
            let _ = empty();
        }
    }
}

/// Orders the last picture, and waits until [`LAST_PICTURE`].
pub(super) fn finish(painter: &Writer) {
    painter.order();
    if !painter.wait(LAST_PICTURE) {
        log::warn!("the memory picture is out of date: it was not written in {LAST_PICTURE:?}");
    }
}
