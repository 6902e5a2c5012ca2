//! Notices that the emulated host stands still: its processor stays at one place, with interrupts off.
//!
//! A fault of QEMU's emulated SVM makes it do so (src/design.md, "A host with KVM, anywhere").

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

/// The time between two looks at the processor, and how many looks in a row have to find it at one place.
const PAUSE: Duration = Duration::from_secs(5);
const LOOKS: usize = 8;

/// Bytes of code in which a processor that waits for a lock can be seen.
const LOOP: u64 = 16;

/// What ends the output of a command of QEMU's monitor.
const PROMPT: &[u8] = b"(qemu) ";

/// Where the processor is, with interrupts off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    instruction: u64,
    stack: u64,
}

/// Looks at the processor until it stands still; then says where. `None` when QEMU has ended.
pub fn watch(mut monitor: UnixStream) -> Option<String> {
    let mut first = None;
    let mut looks = 0;
    read_answer(&mut monitor).ok()?;
    loop {
        thread::sleep(PAUSE);
        monitor.write_all(b"info registers\n").ok()?;
        let now = place(&read_answer(&mut monitor).ok()?);
        match first.zip(now) {
            Some((first, now)) if stays(first, now) => looks += 1,
            _ => (first, looks) = (now, 1),
        }
        if let Some(place) = now.filter(|_| looks == LOOKS) {
            let seconds = PAUSE.as_secs() * (LOOKS as u64 - 1);
            return Some(format!(
                "the emulated host stands still: for {seconds} s its processor has been at {:#x}, with interrupts off",
                place.instruction
            ));
        }
    }
}

fn stays(first: Place, now: Place) -> bool {
    now.stack == first.stack && now.instruction.abs_diff(first.instruction) < LOOP
}

fn read_answer(monitor: &mut UnixStream) -> io::Result<String> {
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    while !answer.ends_with(PROMPT) {
        match monitor.read(&mut buffer)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            length => answer.extend_from_slice(&buffer[..length]),
        }
    }
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// Out of the output of `info registers`. `None` with interrupts on; and in the 16 and 32 bit modes, whose
/// registers have other names: a guest's firmware is there, for a moment.
fn place(registers: &str) -> Option<Place> {
    const INTERRUPTS: u64 = 1 << 9;
    let value = |name: &str| {
        let (_, rest) = registers.split_once(name)?;
        let digits = rest.split(|other: char| !other.is_ascii_hexdigit()).next()?;
        u64::from_str_radix(digits, 16).ok()
    };
    let (instruction, stack, flags) = (value("RIP=")?, value("RSP=")?, value("RFL=")?);
    (flags & INTERRUPTS == 0).then_some(Place { instruction, stack })
}

#[cfg(test)]
mod tests {
    use super::*;

    const REGISTERS: &str = "CPU#0\r\n\
        RSI=0000000000000001 RDI=ffff8880048cd4a4 RBP=ffff8880048cd4a4 RSP=ffffc90000003e70\r\n\
        RIP=ffffffff81ca26e8 RFL=00000002 [-------] CPL=0 II=0 A20=1 SMM=0 HLT=0\r\n(qemu) ";

    #[test]
    fn a_place_is_read_out_of_the_registers() {
        let here = Place { instruction: 0xffff_ffff_81ca_26e8, stack: 0xffff_c900_0000_3e70 };
        assert_eq!(place(REGISTERS), Some(here));
        assert_eq!(place(&REGISTERS.replace("R", "E")), None);
        assert_eq!(place(&REGISTERS.replace("RFL=00000002", "RFL=00000246")), None);
        assert!(stays(here, here));
        assert!(stays(here, Place { instruction: here.instruction - 2, ..here }));
        assert!(!stays(here, Place { instruction: here.instruction + 16, ..here }));
        assert!(!stays(here, Place { stack: 0, ..here }));
    }
}
