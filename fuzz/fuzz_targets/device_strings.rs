//! The command line: device strings, sizes, time spans, serial lines, and whole command lines.
//!
//! The first byte chooses one of these, the rest is the text; a command line is an argument a line.
//!
//! Nothing panics. What is accepted satisfies the limits that the help states, and means the same when it is
//! written out in full and parsed again. A size is accepted exactly when it is digits and a unit and fits
//! into 64 bits.

#![no_main]

use std::time::Duration;

use clap::Parser;
use hotslot::cli::Cli;
use hotslot::config::device::DeviceSpec;
use hotslot::config::{SerialLine, parse_duration};
use hotslot::size;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((&which, text)) = data.split_first() else {
        return;
    };
    let Ok(text) = std::str::from_utf8(text) else {
        return;
    };
    match which % 5 {
        0 => device(text),
        1 => memory(text),
        2 => time_span(text),
        3 => serial_line(text),
        _ => command_line(text),
    }
});

fn device(text: &str) {
    match text.parse::<DeviceSpec>() {
        Ok(device) => check_device(&device),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

fn check_device(device: &DeviceSpec) {
    let DeviceSpec { name, socket, kind, queues, queue_size, shmem_bit, share_shmem, .. } = device;
    let DeviceSpec { shmem_rate, shmem_limit, foreign_files, prefault, reconnect, .. } = device;
    assert!(!name.is_empty() && !socket.as_os_str().is_empty());
    assert!((1..=255).contains(&kind.id()));
    assert!(queues.is_none_or(|queues| (1..=256).contains(&queues)));
    assert!(queue_size.is_none_or(|size| size.is_power_of_two() && size <= 32768));
    let DeviceSpec { config_size, config, mac, tag, shmem, .. } = device;
    assert!(config_size.is_none_or(|size| size <= 3840));
    assert!((20..=22).contains(shmem_bit));
    let queues = queues.map_or(String::new(), |queues| format!(",queues={queues}"));
    let size = queue_size.map_or(String::new(), |size| format!(",queue-size={size}"));
    let config_size = config_size.map_or(String::new(), |size| format!(",config-size={size}"));
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>();
    let config = config.as_ref().map_or(String::new(), |bytes| format!(",config={}", hex(bytes).concat()));
    let mac = mac.map_or(String::new(), |mac| format!(",mac={}", hex(&mac).join(":")));
    let tag = tag.as_ref().map_or(String::new(), |tag| format!(",tag={tag}"));
    let shmem = shmem.map_or(String::new(), |(id, size)| format!(",shmem={id}:{size}"));
    let rate = shmem_rate.map_or(String::new(), |rate| format!(",shmem-rate={rate}"));
    assert!(*shmem_limit >= 4096);
    let [share, foreign, prefault] =
        [share_shmem, foreign_files, prefault].map(|is_on| if *is_on { "on" } else { "off" });
    let reconnect = reconnect.map_or(String::new(), |time| format!(",reconnect={}", time.as_secs()));
    let more = format!("shmem-limit={shmem_limit},foreign-files={foreign},prefault={prefault}{reconnect}");
    let full = format!(
        "{},share-shmem={share},shmem-bit={shmem_bit},name={name},type={}{queues}{size}{config_size}{config}{mac}{tag}{shmem}{rate},{more}",
        socket.display(),
        kind.id(),
    );
    assert_eq!(full.parse().as_ref(), Ok(device), "{full}");
}

fn memory(text: &str) {
    let digits = text.trim_end_matches(|last: char| "KMGTkmgt".contains(last));
    let is_size = text.len() <= digits.len() + 1
        && !digits.is_empty()
        && digits.bytes().all(|byte| byte.is_ascii_digit());
    let expected = is_size.then(|| {
        let unit = match text.as_bytes()[text.len() - 1].to_ascii_uppercase() {
            b'K' => 1 << 10,
            b'M' => 1 << 20,
            b'G' => 1 << 30,
            b'T' => 1 << 40,
            _ => 1,
        };
        let number = digits.trim_start_matches('0').parse::<u128>().unwrap_or(0);
        let fits = digits.trim_start_matches('0').len() <= 20;
        fits.then(|| u64::try_from(number * unit).ok()).flatten()
    });
    assert_eq!(size::parse(text).ok(), expected.flatten(), "{text:?}");
}

fn time_span(text: &str) {
    let Ok(span) = parse_duration(text) else { return };
    assert_eq!(span.subsec_nanos() % 1_000_000, 0);
    let full = match (span.subsec_millis(), u64::try_from(span.as_millis())) {
        (0, _) => format!("{}s", span.as_secs()),
        (_, millis) => format!("{}ms", millis.expect("it was a u64 of milliseconds")),
    };
    assert_eq!(parse_duration(&full), Ok(span), "{text:?}");
}

fn serial_line(text: &str) {
    let Ok(line) = text.parse::<SerialLine>() else {
        return;
    };
    let full = match &line {
        SerialLine::Stdio => "stdio".to_string(),
        SerialLine::Off => "off".to_string(),
        SerialLine::File(path) => format!("file={}", path.display()),
    };
    assert_eq!(full, text);
}

fn command_line(text: &str) {
    let arguments = ["hotslot"].into_iter().chain(text.split('\n'));
    let Some(config) = Cli::try_parse_from(arguments).ok().and_then(Cli::into_config) else {
        return;
    };
    assert!(config.cpus >= 1 && config.connect_timeout <= Duration::from_secs(u64::MAX));
    config.devices.iter().for_each(check_device);
}
