//! A file as fuse-backend-rs demands it, `&mut File`, while several threads use it: without a descriptor of
//! its own. Called by [`super::passthrough`].

#![expect(unsafe_code, reason = "std has no `&mut File` of a borrowed descriptor")]

use std::fs::File;
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd};

/// A borrowed file, for reads and writes at offsets.
pub struct Lent<'a> {
    file: ManuallyDrop<File>,
    _owner: PhantomData<&'a File>,
}

impl<'a> Lent<'a> {
    pub fn of(owner: &'a File) -> Self {
        // SAFETY: `owner` owns the descriptor and keeps it open for as long as this lives ('a). This never
        // closes it: it is not dropped, and it is handed out by `&mut` only.
        let file = unsafe { File::from_raw_fd(owner.as_raw_fd()) };
        Lent { file: ManuallyDrop::new(file), _owner: PhantomData }
    }

    pub fn get(&mut self) -> &mut File {
        &mut self.file
    }
}
