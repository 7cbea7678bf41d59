//! `--device`: where to compute.

use anyhow::Result;
use metal_candle::Device;

#[derive(clap::Args)]
pub(crate) struct DeviceArgs {
    /// Where to compute: auto, cpu, cuda, cuda:N or metal; auto is the best that this machine and
    /// this build have
    #[arg(long, default_value = "auto", value_name = "DEVICE", value_parser = parse)]
    device: Choice,
    /// Let products of f32 numbers round them to TF32, on NVIDIA GPUs that have it
    #[arg(long)]
    tf32: bool,
}

/// `None` is the best one.
#[derive(Clone, Copy)]
struct Choice(Option<Device>);

fn parse(name: &str) -> Result<Choice, String> {
    match name {
        "auto" => Ok(Choice(None)),
        name => match Device::parse(name) {
            Ok(device) => Ok(Choice(Some(device))),
            Err(_) => Err("expected auto, cpu, cuda, cuda:N or metal".to_owned()),
        },
    }
}

impl DeviceArgs {
    /// The device that was asked for, which need not be here.
    pub(crate) fn named(&self) -> Device {
        self.device.0.unwrap_or_else(Device::best)
    }

    /// Whether one was asked for, and not the best.
    pub(crate) fn is_chosen(&self) -> bool {
        self.device.0.is_some()
    }

    /// The device to compute on.
    ///
    /// # Errors
    /// Where this build or this machine lacks it.
    pub(crate) fn present(&self) -> Result<Device> {
        let device = self.named();
        device.check()?;
        metal_candle::allow_tf32(self.tf32);
        Ok(device)
    }
}
