"""From the real seat module's counter to the cloud's judgement, through engine, guard and ISO-TP."""

from __future__ import annotations

from support.edge_vehicle import EdgeVehicle
from support.readings import judge
from support.trust_repo import Cloud
from vectors.make_reading_vectors import ECU_KEY

from cloud.readings import Reading, parse

ASK = bytes.fromhex("220F41")


def read(content: bytes) -> Reading:
    reading = parse(content)
    reading.check_signature(ECU_KEY.public)
    return reading


def granted() -> EdgeVehicle:
    """A vehicle whose feature is on and whose driver heats."""
    cloud = Cloud()
    vehicle = EdgeVehicle(cloud)
    cloud.grant()
    vehicle.receive(cloud.answer)
    assert vehicle.is_on
    vehicle.press(2)
    return vehicle


def test_what_the_ecu_counted_reaches_the_cloud_untouched_and_fits() -> None:
    vehicle = granted()
    vehicle.run_ms(1_240_000)
    readings, found = judge(vehicle.records, read)
    assert vehicle.requests.count(ASK) == 3  # when it went on, and every ten minutes
    assert [reading.reading for reading in readings] == [1, 2, 3]
    assert readings[-1].on_ms - readings[0].on_ms >= 1_190_000
    assert readings[-1].executions == 1
    assert found == []


def test_the_power_of_the_ecu_is_cut_again_and_again_without_a_finding() -> None:
    vehicle = granted()
    for _ in range(15):
        vehicle.run_ms(97_000)
        vehicle.cut_ecu_power()
    vehicle.run_ms(620_000)
    readings, found = judge(vehicle.records, read)
    assert len(readings) >= 3
    assert readings[-1].on_ms <= vehicle.heated_ms
    assert found == []
