"""The Verilog of a folded network: a module for each unit, and what puts them together.

Between units stand memories of two banks. A unit begins when its bank is full and the bank behind it is empty; when its
last result is written it turns both over. All control is the same whatever the samples are.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray

from modelpress_compression.backends.fpga.folded_unit import Unit

TOP = "network_wrapper"


def unit_module(place: int, unit: Unit) -> str:
    """`unit{place}`: reads its memory, and writes results with their addresses."""
    p, groups, k = unit.multipliers, unit.groups, len(unit.offsets)
    source, target = unit.source, unit.target
    weights, biases = _grouped(unit)
    channel_step = prod(target.padded[1:])
    return _UNIT.format(
        name=f"unit{place}",
        p=p,
        k=k,
        groups=groups,
        places=len(unit.window),
        rows=unit.rows,
        columns=unit.columns,
        last_group=unit.outputs - (groups - 1) * p,
        address=source.address_bits,
        target_address=target.address_bits,
        input=source.form.width,
        x="$signed(read_data)" if source.form.signed else "$signed({1'b0, read_data})",
        weight=unit.weight_bits,
        sum=unit.sum_bits,
        shift=unit.shift,
        out=target.form.width,
        saturated=_saturated(unit),
        larger="$signed(result) > $signed(largest)" if target.form.signed else "result > largest",
        row_step=unit.row_step - (unit.columns - 1) * unit.column_step,
        column_step=unit.column_step,
        channel_step=channel_step,
        target_start=target.start,
        target_row=target.padded[2] - (unit.columns - 1),
        k_bits=_bits(k),
        word_bits=_bits(groups * k),
        group_bits=_bits(groups),
        place_bits=_bits(len(unit.window)),
        row_bits=_bits(unit.rows),
        column_bits=_bits(unit.columns),
        p_bits=_bits(p + 1),
        roms="\n        ".join(
            [
                *_rom("offsets", unit.offsets[:, None], source.address_bits),
                *_rom("window", unit.window[:, None], source.address_bits),
                *_rom("weights", weights, unit.weight_bits),
                *_rom("biases", biases, unit.sum_bits),
            ]
        ),
    )


def _saturated(unit: Unit) -> str:
    """The sum without the bits that are cut off, between the ends of the output's format; ends that it cannot reach are
    not looked at."""
    out, reach = unit.target.form, 2 ** (unit.sum_bits - 1)
    low = 0 if unit.relu or not out.signed else -(2 ** (out.width - 1))
    high = unit.ceiling
    text = "cut"
    if high < reach - 1:
        text = f"cut > {unit.sum_bits}'sd{high} ? {unit.sum_bits}'sd{high} : {text}"
    if low > -reach:
        end = f"-{unit.sum_bits}'sd{-low}" if low else f"{unit.sum_bits}'sd0"
        text = f"cut < {end} ? {end} : {text}"
    return text


def top_module(units: Sequence[Unit]) -> str:
    """Takes a sample value by value, and gives the answer so."""
    given, made = units[0].source, units[-1].target
    parts = []
    for place, unit in enumerate(units):
        last = place == len(units) - 1
        values = {
            "i": place,
            "next": place + 1,
            "ready": "" if last else f" && !full{place + 1}[write{place + 1}]",
            "address": unit.source.address_bits - 1,
            "value": unit.source.form.width - 1,
            "size": 2 ** (unit.source.address_bits + 1),
            "out_address": unit.target.address_bits - 1,
            "out_value": unit.target.form.width - 1,
        }
        parts.append((_MEMORY + _INSTANCE + ("" if last else _CONNECTION)).format(**values))
    channels, height, width = given.shape
    _, padded_height, padded_width = given.padded
    return _TOP.format(
        top=TOP,
        given=given.form.width - 1,
        made=made.form.width - 1,
        made_address=made.address_bits - 1,
        address=given.address_bits - 1,
        start=given.start,
        width=width,
        height=height,
        channels=channels,
        row=padded_width - width + 1,
        channel=(padded_height - height) * padded_width + padded_width - width + 1,
        width_bits=_bits(width),
        height_bits=_bits(height),
        channel_bits=_bits(channels),
        last=len(units) - 1,
        parts="".join(parts),
    )


def _grouped(unit: Unit) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Weights [groups * K, P] and biases [groups, P]; outputs that fill the last group up are 0."""
    p, groups, k = unit.multipliers, unit.groups, len(unit.offsets)
    weights = np.zeros((groups * p, k), np.int64)
    weights[: unit.outputs] = unit.weights
    biases = np.zeros(groups * p, np.int64)
    biases[: unit.outputs] = unit.biases
    return weights.reshape(groups, p, k).transpose(0, 2, 1).reshape(groups * k, p), biases.reshape(groups, p)


def _bits(count: int) -> int:
    """Of a counter up to count - 1."""
    return max(1, (count - 1).bit_length())


def _rom(name: str, rows: NDArray[np.int64], width: int) -> list[str]:
    """Its content, the first number of a row in the lowest bits."""
    mask, lines = (1 << width) - 1, []
    for place, row in enumerate(rows.tolist()):
        word = sum((value & mask) << (width * index) for index, value in enumerate(row))
        lines.append(f"{name}_rom[{place}] = {width * len(row)}'h{word:x};")
    return lines


_UNIT = """// {p} multipliers, {groups} groups of outputs, {k} products each.
module {name} (
    input clk,
    input start,
    output reg busy,
    output reg done,
    output reg [{address}-1:0] read_address,
    input [{input}-1:0] read_data,
    output reg write,
    output reg [{target_address}-1:0] write_address,
    output reg [{out}-1:0] write_data
);
    reg [{address}-1:0] offsets_rom [0:{k}-1];
    reg [{address}-1:0] window_rom [0:{places}-1];
    reg [{p}*{weight}-1:0] weights_rom [0:{groups}*{k}-1];
    reg [{p}*{sum}-1:0] biases_rom [0:{groups}-1];
    initial begin
        {roms}
    end

    // Counters: product, place of the window, group of outputs, column, row.
    reg running;
    reg [{k_bits}-1:0] k;
    reg [{word_bits}-1:0] word;
    reg [{place_bits}-1:0] place;
    reg [{group_bits}-1:0] group;
    reg [{column_bits}-1:0] column;
    reg [{row_bits}-1:0] row;
    reg [{address}-1:0] base;
    wire last_k = k == {k} - 1;
    wire last_place = place == {places} - 1;
    wire last_group = group == {groups} - 1;
    wire last_column = column == {columns} - 1;
    wire last_row = row == {rows} - 1;
    initial running = 0;
    always @(posedge clk) begin
        if (start) begin
            running <= 1; k <= 0; word <= 0; place <= 0; group <= 0; column <= 0; row <= 0; base <= 0;
        end else if (running) begin
            k <= last_k ? 0 : k + 1;
            word <= word + 1;
            if (last_k) begin
                place <= last_place ? 0 : place + 1;
                if (!last_place) word <= word - ({k} - 1);
                else begin
                    group <= last_group ? 0 : group + 1;
                    if (last_group) begin
                        word <= 0;
                        column <= last_column ? 0 : column + 1;
                        base <= base + (last_column ? {row_step} : {column_step});
                        if (last_column) begin
                            row <= row + 1;
                            if (last_row) running <= 0;
                        end
                    end
                end
            end
        end
    end

    // What goes along: valid, the first and the last product of a sum, the first and the last place.
    reg [4:0] along1, along2, along3, along4, along5;
    reg [{group_bits}-1:0] group1, group2, group3;
    reg [{address}-1:0] offset1, base1;
    reg [{word_bits}-1:0] word1, word2;
    reg [{p}*{weight}-1:0] weights3;
    reg [{p}*{sum}-1:0] biases4;
    initial begin
        along1 = 0; along2 = 0; along3 = 0; along4 = 0; along5 = 0;
    end
    always @(posedge clk) begin
        along1 <= {{running, k == 0, last_k, place == 0, last_place}};
        along2 <= along1; along3 <= along2; along4 <= along3; along5 <= along4;
        group1 <= group; group2 <= group1; group3 <= group2;
        word1 <= word; word2 <= word1;
        offset1 <= offsets_rom[k];
        base1 <= base + window_rom[place];
        read_address <= base1 + offset1;
        weights3 <= weights_rom[word2];
        biases4 <= biases_rom[group3];
    end

    // Multiplies, adds, rounds, saturates, and keeps the largest of the window.
    wire [{p}*{out}-1:0] all;
    genvar n;
    generate
        for (n = 0; n < {p}; n = n + 1) begin : lane
            wire signed [{weight}-1:0] weight = weights3[n*{weight} +: {weight}];
            wire signed [{sum}-1:0] bias = biases4[n*{sum} +: {sum}];
            reg signed [{weight}+{input}:0] product;
            reg signed [{sum}-1:0] total;
            reg [{out}-1:0] largest;
            wire signed [{sum}-1:0] cut = total >>> {shift};
            wire [{out}-1:0] result = {saturated};
            always @(posedge clk) begin
                product <= {x} * weight;
                total <= (along4[3] ? bias : total) + product;
                if (along5[4] && along5[2] && (along5[1] || {larger})) largest <= result;
            end
            assign all[n*{out} +: {out}] = largest;
        end
    endgenerate

    // Writes the results of a group one after the other, while the next are under way.
    reg ready, finishing;
    reg [{p}*{out}-1:0] results;
    reg [{p_bits}-1:0] left;
    reg [{group_bits}-1:0] out_group;
    reg [{column_bits}-1:0] out_column;
    reg [{row_bits}-1:0] out_row;
    reg [{target_address}-1:0] place_address, address;
    wire out_last_group = out_group == {groups} - 1;
    wire out_last_column = out_column == {columns} - 1;
    initial begin
        busy = 0; done = 0; write = 0; ready = 0; finishing = 0; left = 0;
    end
    always @(posedge clk) begin
        ready <= along5[4] && along5[2] && along5[0];
        write <= left != 0;
        write_address <= address;
        write_data <= results[{out}-1:0];
        if (left != 0) begin
            address <= address + {channel_step};
            results <= results >> {out};
            left <= left - 1;
        end
        if (ready) begin
            results <= all;
            left <= out_last_group ? {last_group} : {p};
            if (out_group == 0) address <= place_address;
            out_group <= out_last_group ? 0 : out_group + 1;
            if (out_last_group) begin
                out_column <= out_last_column ? 0 : out_column + 1;
                place_address <= place_address + (out_last_column ? {target_row} : 1);
                if (out_last_column) begin
                    out_row <= out_row + 1;
                    if (out_row == {rows} - 1) finishing <= 1;
                end
            end
        end
        done <= finishing && !ready && left == 0 && !write;
        if (finishing && !ready && left == 0 && !write) begin
            finishing <= 0; busy <= 0;
        end
        if (start) begin
            busy <= 1; out_group <= 0; out_column <= 0; out_row <= 0; place_address <= {target_start};
        end
    end
endmodule
"""

_MEMORY = """
    // What unit {i} reads: one bank is filled while the other is read.
    reg [{value}:0] memory{i} [0:{size}-1];
    reg [1:0] full{i};
    reg write{i}, read{i};
    reg [{value}:0] data{i};
    wire put{i}, turned{i};
    wire [{address}:0] put_address{i}, address{i};
    wire [{value}:0] put_data{i};
    wire start{i}, busy{i}, done{i}, out_write{i};
    wire [{out_address}:0] out_address{i};
    wire [{out_value}:0] out_value{i};
    integer fill{i};
    initial begin
        full{i} = 0; write{i} = 0; read{i} = 0;
        for (fill{i} = 0; fill{i} < {size}; fill{i} = fill{i} + 1) memory{i}[fill{i}] = 0;
    end
    always @(posedge clk) begin
        if (put{i}) memory{i}[{{write{i}, put_address{i}}}] <= put_data{i};
        data{i} <= memory{i}[{{read{i}, address{i}}}];
        if (turned{i}) begin
            full{i}[write{i}] <= 1; write{i} <= !write{i};
        end
        if (done{i}) begin
            full{i}[read{i}] <= 0; read{i} <= !read{i};
        end
    end"""

_INSTANCE = """
    assign start{i} = !busy{i} && !done{i} && full{i}[read{i}]{ready};
    unit{i} layer{i} (.clk(clk), .start(start{i}), .busy(busy{i}), .done(done{i}), .read_address(address{i}),
        .read_data(data{i}), .write(out_write{i}), .write_address(out_address{i}), .write_data(out_value{i}));
"""

_CONNECTION = """    assign put{next} = out_write{i};
    assign put_address{next} = out_address{i};
    assign put_data{next} = out_value{i};
    assign turned{next} = done{i};
"""

_TOP = """`timescale 1ns / 1ps

// A sample goes in value by value, row by row, while in_ready; the answer comes out with the number of each value.
module {top} (
    input clk,
    input in_valid,
    output in_ready,
    input [{given}:0] in_data,
    output reg out_valid,
    output reg [{made_address}:0] out_index,
    output reg [{made}:0] out_data
);
    reg [{address}:0] in_address;
    reg [{width_bits}-1:0] in_column;
    reg [{height_bits}-1:0] in_row;
    reg [{channel_bits}-1:0] in_channel;
    reg turning;
    initial begin
        in_address = {start}; in_column = 0; in_row = 0; in_channel = 0; turning = 0; out_valid = 0;
    end
{parts}
    wire taken = in_valid && in_ready;
    wire end_row = in_column == {width} - 1;
    wire end_map = end_row && in_row == {height} - 1;
    wire end_sample = end_map && in_channel == {channels} - 1;
    assign in_ready = !full0[write0] && !turning;
    assign put0 = taken;
    assign put_address0 = in_address;
    assign put_data0 = in_data;
    assign turned0 = turning;
    always @(posedge clk) begin
        turning <= taken && end_sample;
        if (taken) begin
            in_column <= end_row ? 0 : in_column + 1;
            if (end_row) in_row <= end_map ? 0 : in_row + 1;
            if (end_map) in_channel <= end_sample ? 0 : in_channel + 1;
            in_address <= end_sample ? {start} : in_address + (end_map ? {channel} : end_row ? {row} : 1);
        end
        out_valid <= out_write{last};
        out_index <= out_address{last};
        out_data <= out_value{last};
    end
endmodule
"""
